"""Models of every JSON file that a step writes, used by the steps that write and by those that read."""
