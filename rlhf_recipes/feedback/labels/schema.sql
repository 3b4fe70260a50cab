CREATE TABLE settings (seed TEXT NOT NULL, overlap REAL NOT NULL DEFAULT 0.1);
CREATE TABLE groups (
    number INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    content TEXT NOT NULL,
    wanted INTEGER NOT NULL DEFAULT 1
);
CREATE TABLE labellers (number INTEGER PRIMARY KEY, name TEXT NOT NULL, folded TEXT NOT NULL UNIQUE);
CREATE TABLE sessions (session TEXT PRIMARY KEY, labeller INTEGER NOT NULL REFERENCES labellers);
CREATE TABLE claims (
    labeller INTEGER PRIMARY KEY REFERENCES labellers,
    group_number INTEGER NOT NULL REFERENCES groups,
    until REAL NOT NULL
);
CREATE TABLE labels (
    number INTEGER PRIMARY KEY,
    group_number INTEGER NOT NULL REFERENCES groups,
    labeller INTEGER NOT NULL REFERENCES labellers,
    submission TEXT NOT NULL,
    ranks TEXT,
    demonstration TEXT,
    note TEXT,
    at TEXT NOT NULL,
    withdrawn TEXT
);
CREATE UNIQUE INDEX one_label ON labels (group_number, labeller) WHERE withdrawn IS NULL;
CREATE INDEX labels_of ON labels (labeller, group_number);
