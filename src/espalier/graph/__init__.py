"""Watch one forward and know which channels live or die together."""
