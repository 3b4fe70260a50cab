"""Training stages on TRL's trainers: what a run resumes from, saves and records."""
