"""``python -m espalier`` is the ``espalier`` command."""

from espalier.present.cli import app

if __name__ == "__main__":
    app()
