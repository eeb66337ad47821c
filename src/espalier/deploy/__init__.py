"""Out of the house: files that run without Espalier, in eight bits too."""
