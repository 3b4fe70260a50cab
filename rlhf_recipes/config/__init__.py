"""Argument dataclasses, the strict parser that fills them, launchers and trackers."""
