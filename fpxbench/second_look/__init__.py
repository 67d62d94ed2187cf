"""Builds held against each other once more: a suspected change measured again, the first bad build, two builds side by side."""
