"""One HTML file that shows the removed branches of a network and their effects."""
