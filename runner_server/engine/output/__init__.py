"""From generated tokens to the reader: text, stop strings, output channels, wakeups."""
