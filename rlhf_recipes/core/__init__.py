"""What every other package stands on: errors, files, YAML, the Hub, the machine."""
