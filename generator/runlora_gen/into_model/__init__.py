"""Generated modules into a model: where they are generated, imported and put in."""
