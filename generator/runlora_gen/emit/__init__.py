"""From decisions to text: nodes for the templates, black, atomic publication, the manifest."""
