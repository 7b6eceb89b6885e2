"""One HTML file that shows what was removed from a network and what that changed."""
