"""Models as they lie in files and folders of other tools, and back."""
