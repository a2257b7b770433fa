"""The commands, one module each; a command parses, calls the public API, and renders."""
