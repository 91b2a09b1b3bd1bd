"""Dropping channels: which criteria there are, how groups compete, and what makes up for what goes."""
