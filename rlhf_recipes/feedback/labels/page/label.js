"use strict";

const $ = (id) => document.getElementById(id);
const ORDINALS = new Intl.PluralRules("en", {type: "ordinal"});
const ordinal = (n) => n + {one: "st", two: "nd", few: "rd", other: "th"}[ORDINALS.select(n)];

// Unexpected errors: shown on the page, since nobody looks at the console

function showFailure(problem) {
  const text = `The page failed (${problem}). Reload it: what was saved is safe.`;
  for (const id of ["error", "sign-in-error"]) $(id).textContent = text;
}

addEventListener("error", (event) => showFailure(event.message));
addEventListener("unhandledrejection", (event) => showFailure(event.reason));

// Browser storage. If it is blocked or full, values stay in memory, and a notice says so

function storage(name) {
  const memory = new Map();
  const fails = () => { $("notice").hidden = false; return null; };
  return {
    get(key) {
      if (memory.has(key)) return memory.get(key);
      try { return JSON.parse(window[name].getItem(key)); } catch { return null; }
    },
    set(key, value) {
      memory.set(key, value);
      try {
        window[name].setItem(key, JSON.stringify(value));
        memory.delete(key);
      } catch { fails(); }
    },
    remove(key) {
      memory.delete(key);
      try { window[name].removeItem(key); } catch { fails(); }
    },
  };
}

const browser = storage("localStorage");
const tab = storage("sessionStorage");

// The session belongs to this tab: two people may use two tabs of one browser.
let session = tab.get("session");
let task = null;
let newest = null; // number of the label that undo withdraws: repeating a lost request must not undo another
let order = []; // lists of answers, best first; answers in one list tie
let unusable = new Set();
let submission = "";
let marking = false; // x was pressed: the next number marks an unusable answer
let busy = false;
const TOUCH = matchMedia("(hover: none) and (pointer: coarse)");

function element(tag, content = "", attributes = {}) {
  const made = document.createElement(tag);
  made.textContent = content; // never HTML: a model may have written it
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

// Text of a model: never HTML. Code between lines of ``` is set in a font for code, and nothing is left out
function written(content, attributes = {}) {
  const made = element("div", "", {dir: "auto", ...attributes});
  const parts = content.split(/^(```[^]*?(?:\n```[^\n]*|(?![^])))/m); // the code of a cut-off answer has no end
  made.append(...parts.filter(Boolean).map((part) => (part.startsWith("```") ? element("code", part) : part)));
  return made;
}

// The server

class Refusal extends Error {
  constructor(text, status) { // an HTTP status; 0 if there was no reply
    super(text);
    this.status = status;
  }
}

async function request(path, body = {}) {
  let reply;
  try {
    reply = await fetch(`api/${path}`, {
      method: "POST",
      headers: {"content-type": "application/json", authorization: `Bearer ${session?.token ?? ""}`},
      body: JSON.stringify(body),
      signal: AbortSignal.timeout(15000),
    });
  } catch {
    throw new Refusal("The server does not answer.", 0);
  }
  const content = await reply.json().catch(() => ({detail: `The server failed (${reply.status}).`}));
  if (!reply.ok) throw new Refusal(content.detail, reply.status);
  return content;
}

async function attempt(action, consequence, unanswered = consequence) {
  if (busy) return;
  busy = true;
  $("work").setAttribute("aria-busy", "true");
  for (const id of ["save", "skip", "undo"]) $(id).disabled = true;
  try {
    $("error").textContent = "";
    await action();
  } catch (error) {
    if (!(error instanceof Refusal)) throw error;
    if (error.status === 401) return showSignIn(`${consequence} ${error.message}`);
    $("status").textContent = "";
    $("error").textContent = `${error.status === 0 ? unanswered : consequence} ${error.message}`;
    if (error.status === 409) {
      closeTask();
      next("You have labelled this prompt in another window already; that label stays.");
    }
  } finally {
    busy = false;
    $("work").removeAttribute("aria-busy");
    for (const id of ["save", "skip", "undo"]) $(id).disabled = false;
  }
}

// Signing in

function showSignIn(error = "") {
  $("work").hidden = true;
  $("sign-in").hidden = false;
  $("known").hidden = true;
  $("sign-in-error").textContent = error;
  $("name").value = session?.name ?? "";
  $("name").focus();
}

async function signIn(known) {
  const name = $("name").value;
  $("known").hidden = true;
  try {
    session = await request("session", {name, password: $("password").value, known});
  } catch (error) {
    if (!(error instanceof Refusal)) throw error;
    $("sign-in-error").textContent = error.message;
    if (error.status === 401) {
      $("password-field").hidden = false;
      $("password").select();
    } else if (error.status === 409) {
      $("sign-in-error").textContent = `${error.message}. Is that you? If not, add something to your name.`;
      $("known").textContent = `Yes, I am ${name}`;
      $("known").hidden = false;
      $("known").focus();
    }
    return;
  }
  tab.set("session", session);
  $("sign-in").hidden = true;
  next("");
}

// Drafts: unsaved input survives a reload and a server that is down

const draftKey = () => `draft ${task.key}`;

function keepDraft() {
  if (!task) return;
  const draft = {order, unusable: [...unusable], submission, demonstration: $("demonstration").value, note: $("note").value};
  browser.set(draftKey(), draft);
}

// No key may act on a finished task while the next one is fetched
function closeTask() {
  browser.remove(draftKey());
  task = null;
  submission = "";
}

function fromLabel(label) {
  const places = new Map();
  const bad = [];
  for (const [answer, rank] of (label.ranks ?? []).entries()) {
    if (rank === null) bad.push(answer);
    else places.set(rank, [...(places.get(rank) ?? []), answer]);
  }
  const ranks = [...places.keys()].sort((one, other) => one - other);
  return {...label, order: ranks.map((rank) => places.get(rank)), unusable: bad};
}

function openDraft() {
  const draft = browser.get(draftKey()) ?? (task.before && fromLabel(task.before)) ?? {};
  order = draft.order ?? [];
  unusable = new Set(draft.unusable ?? []);
  for (const [answer, text] of task.completions.entries()) if (!text) unusable.add(answer);
  submission = draft.submission ?? newSubmission();
  $("demonstration").value = draft.demonstration ?? "";
  $("note").value = draft.note ?? "";
}

function newSubmission() {
  // crypto.randomUUID is missing on plain HTTP from another machine
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

// Ranking

const isBad = (answer) => unusable.has(answer);
const isRanked = (answer) => order.some((tied) => tied.includes(answer));
const isPair = () => task.completions.length === 2;
const isBetter = (answer) => order[0]?.length === 1 && order[0][0] === answer;
const unranked = () => task.completions.map((_, answer) => answer).filter((answer) => !isBad(answer) && !isRanked(answer));

function ranking() {
  const rest = unranked();
  return rest.length === 1 ? [...order, rest] : order; // a single remaining answer is the last
}

function rankOf(answer) {
  return ranking().findIndex((tied) => tied.includes(answer)) + 1;
}

function place(answer, tie) {
  if (!task.completions[answer]) return setStatus(`Answer ${answer + 1} is empty: it can only be unusable.`);
  const wasRanked = isRanked(answer);
  const wasBetter = isBetter(answer);
  unusable.delete(answer);
  if (isPair() && !tie) { // the last one pressed is the better one
    order = wasBetter ? [] : [[answer]];
    return changed(`Answer ${answer + 1} ${wasBetter ? "has no rank now" : "is the better one"}.`);
  }
  order = order.map((tied) => tied.filter((other) => other !== answer)).filter((tied) => tied.length);
  if (tie && order.length) order.at(-1).push(answer);
  else if (!wasRanked) order.push([answer]);
  changed(isRanked(answer) ? `Answer ${answer + 1}: ${placeText(answer)}.` : `Answer ${answer + 1} has no rank now.`);
}

function mark(answer) {
  if (!task.completions[answer]) return setStatus(`Answer ${answer + 1} is empty: it can only be unusable.`);
  order = order.map((tied) => tied.filter((other) => other !== answer)).filter((tied) => tied.length);
  if (!unusable.delete(answer)) unusable.add(answer);
  changed(`Answer ${answer + 1}: ${isBad(answer) ? "unusable" : "usable"}.`);
}

function tieRest() {
  const rest = unranked();
  if (!rest.length) return;
  order.push(rest);
  changed(`The rest: ${placeText(rest[0])}.`);
}

function clear() {
  order = [];
  unusable = new Set([...task.completions.keys()].filter((answer) => !task.completions[answer]));
  changed("Ranks cleared.");
}

function changed(message) {
  keepDraft();
  drawRanks();
  const rest = unranked().length;
  setStatus(`${message} ${rest > 1 ? `${rest} have no rank yet.` : "Ready to save."}`);
}

function setStatus(message) {
  $("error").textContent = "";
  $("status").textContent = message;
}

// Drawing

function placeText(answer) {
  if (isBad(answer)) return "unusable";
  const rank = rankOf(answer);
  if (!rank) return "";
  return `${ordinal(rank)}${ranking()[rank - 1].length > 1 ? ", tied" : ""}`;
}

function drawTask() {
  $("task").hidden = false;
  $("done").hidden = true;
  $("prompt").replaceChildren(...task.prompt.map(({role, content}) => {
    const turn = element("div", "", {class: "turn"});
    if (role) turn.append(element("span", role, {class: "role"}));
    turn.append(written(content));
    return turn;
  }));
  $("answers-title").textContent = isPair() ? "Which answer is better?" : "Rank the answers";
  $("keys-of-two").hidden = !isPair();
  $("keys-of-more").hidden = isPair();
  $("answers").dataset.number = task.completions.length;
  $("answers").replaceChildren(...task.completions.map(drawAnswer));
  drawRanks();
  for (const box of document.querySelectorAll(".text")) {
    // keyboard users scroll a long text by focusing it
    if (box.scrollHeight > box.clientHeight + 1) box.tabIndex = 0;
    else box.removeAttribute("tabindex");
  }
  const last = $("prompt").lastElementChild; // what is answered; earlier turns are above it
  $("prompt").scrollTop = task.prompt.length > 1 ? last.offsetTop - $("prompt").firstElementChild.offsetTop : 0;
}

function drawAnswer(text, answer) {
  const item = element("li", "", {"aria-labelledby": `answer-${answer}`});
  const title = element("h3");
  title.append(element("span", `Answer ${answer + 1}`, {id: `answer-${answer}`}), element("span", "", {class: "place"}));
  const body = written(text || "(empty: the model ended at once)", {
    class: text ? "text" : "text empty", role: "group", "aria-labelledby": `answer-${answer}`,
  });
  const choices = element("div", "", {class: "choices"});
  const buttons = [["rank", () => place(answer, false)], ["tie", () => place(answer, true)], ["bad", () => mark(answer)]];
  for (const [name, act] of buttons) {
    const button = element("button", "", {type: "button", "data-choice": name});
    button.addEventListener("click", act);
    choices.append(button);
  }
  item.append(title, body, choices);
  return item;
}

function drawRanks() {
  const next = order.length + 1;
  for (const [answer, item] of [...$("answers").children].entries()) {
    const ranked = isRanked(answer);
    const implied = !ranked && rankOf(answer) > 0;
    item.className = isBad(answer) ? "unusable" : ranked ? "ranked" : "";
    const shown = item.querySelector(".place");
    shown.textContent = placeText(answer) + (implied ? " (what is left)" : "");
    shown.classList.toggle("implied", implied);
    const [rank, tie, bad] = item.querySelectorAll("button");
    const takesBack = isPair() ? isBetter(answer) : ranked;
    const best = isPair() ? "Better" : next === 1 ? "Best" : `Make it ${ordinal(next)}`;
    rank.textContent = takesBack ? `${ordinal(rankOf(answer))}: take back` : best;
    tie.textContent = `Tie with ${ordinal(order.length)}`;
    tie.hidden = !order.length || ranked;
    bad.textContent = "Unusable";
    bad.setAttribute("aria-pressed", isBad(answer));
    for (const button of [rank, tie]) button.disabled = !task.completions[answer];
    for (const button of [rank, tie, bad]) button.setAttribute("aria-label", `${button.textContent}, answer ${answer + 1}`);
  }
}

function show(reply, message) {
  task = reply.task;
  newest = reply.newest;
  marking = false;
  $("work").hidden = false;
  $("who").textContent = session.name;
  $("bar").max = reply.mine + reply.left || 1;
  $("bar").value = reply.mine;
  $("progress").textContent = `${reply.mine} done, ${reply.left} left`;
  for (const id of ["save", "skip", "clear"]) $(id).hidden = !task;
  if (task) {
    openDraft();
    drawTask();
  } else {
    $("task").hidden = true;
    $("done").hidden = false;
    $("done-title").textContent = reply.held ? "All done for now" : "All done";
    $("held").textContent = reply.held
      ? `Others have ${reply.held} more on their screens. What they leave is yours in an hour: reload the page then.`
      : "";
  }
  scrollTo(0, 0);
  $(task ? "prompt-title" : "done-title").focus({preventScroll: true});
  $("status").textContent = message;
}

// Actions

const next = async (message) => {
  try {
    show(await request("task"), message);
  } catch (error) {
    if (!(error instanceof Refusal)) throw error;
    if (error.status === 401) return showSignIn(error.message);
    task = null; // the draft is kept with its prompt
    $("work").hidden = false;
    $("status").textContent = message;
    $("error").textContent = `${message} The next prompt is not here yet: ${error.message} Press Enter, or reload the page, to try again.`;
    for (const id of ["task", "save", "skip", "clear"]) $(id).hidden = true;
  }
};

function send(ranks, message) {
  const demonstration = $("demonstration").value;
  const note = $("note").value;
  keepDraft();
  return attempt(async () => {
    $("status").textContent = "Saving…";
    const draft = {order, unusable: [...unusable], demonstration, note};
    const key = draftKey();
    await request("label", {id: task.id, submission, ranks, demonstration, note});
    closeTask();
    if (!ranks) browser.set(key, draft); // the server does not get the ranks of a skip; undo restores them from here
    await next(message);
  }, "This label is NOT saved; what you entered is kept here. Save again to send it.");
}

function save() {
  const rest = unranked().map((answer) => answer + 1);
  if (rest.length > 1) {
    setStatus("");
    const numbers = `${rest.slice(0, -1).join(", ")} and ${rest.at(-1)}`;
    $("error").textContent = `Not saved yet: answers ${numbers} have no rank. Rank them, mark them unusable, or skip the prompt.`;
    return;
  }
  send(task.completions.map((_, answer) => rankOf(answer) || null), "Saved.");
}

const skip = () => send(null, "Skipped.");

const undo = () => attempt(async () => {
  const reply = await request("undo", {label: newest});
  if (reply.task.before?.ranks) browser.remove(`draft ${reply.task.key}`);
  show(reply, "Undone: change it and save it again.");
}, "Nothing was undone.", "Whether the label was undone is not known. Undo again: that takes back no other one.");

const fetchNext = () => attempt(() => next(""), "");

// Keys

const KEYS = {
  enter: () => (task ? save() : fetchNext()), s: skip, u: undo, c: clear, 0: tieRest,
  d: () => $("demonstration").focus(),
  n: () => $("note").focus(),
  x: () => { setStatus("Which answer is unusable? Press its number."); marking = true; },
};

function pressed(event) {
  if ($("work").hidden || event.altKey || event.repeat || event.isComposing) return;
  const typing = event.target.matches("textarea, input:not([type=checkbox])");
  if (event.key === "Escape" && typing) return event.target.blur();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && task) {
    event.preventDefault();
    return save();
  }
  if (typing || event.ctrlKey || event.metaKey || !$("shortcuts").checked || TOUCH.matches || busy) return;
  if (event.key === "Enter" && event.target.matches("button, input")) return; // Enter presses the button
  if (!task && !["u", "Enter"].includes(event.key)) return;
  const digit = /^(?:Digit|Numpad)([0-9])$/.exec(event.code)?.[1]; // by key position: Shift turns a digit into another character
  // letters by key position too on keyboards of other scripts
  const letter = /^[^\x00-\x7f]$/.test(event.key) ? event.code.replace("Key", "") : event.key;
  const wasMarking = marking;
  marking = false;
  const act = digit > 0 ? () => choose(digit - 1, wasMarking, event.shiftKey) : KEYS[digit ?? letter.toLowerCase()];
  if (!act) return;
  event.preventDefault();
  act();
}

function choose(answer, unusableOne, tie) {
  if (answer >= task.completions.length) return setStatus(`There is no answer ${answer + 1}.`);
  if (unusableOne) mark(answer);
  else place(answer, tie);
}

document.addEventListener("keydown", pressed);
// After a click, Enter saves: with the focus still on the button it would take the choice back
document.addEventListener("click", (event) => event.detail && event.target.closest("button, [type=checkbox]")?.blur());
$("sign-in-form").addEventListener("submit", (event) => { event.preventDefault(); signIn(false); });
$("known").addEventListener("click", () => signIn(true));
$("sign-out").addEventListener("click", () => {
  tab.remove("session");
  session = null;
  showSignIn();
});
for (const [id, act] of Object.entries({save, skip, clear, undo})) $(id).addEventListener("click", act);
for (const id of ["demonstration", "note"]) $(id).addEventListener("input", keepDraft);
$("shortcuts").checked = browser.get("shortcuts") !== false;
$("shortcuts").addEventListener("change", () => browser.set("shortcuts", $("shortcuts").checked));
if (session) next("");
else showSignIn();
