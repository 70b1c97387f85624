"""The object that users hold."""
