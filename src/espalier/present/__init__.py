"""Command line, reports and export."""
