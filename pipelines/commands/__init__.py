"""The commands of `xtoken`, a module per kind; each imports what it needs when it runs, so that the others start at once."""
