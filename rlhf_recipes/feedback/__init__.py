"""Feedback on sampled answers: groups, rankings and labels."""
