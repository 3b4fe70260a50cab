"""Arguments of the recipes, the strict parser that fills them, launchers and trackers."""
