"""Chromium out of PySide6, where none is installed: ``python tests/webengine.py WIDTH URL``.

Prints the page as it stands after loading, and on standard error a line ``CONSOLE ...`` for every message of its console.
"""

import os
import sys

os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")
os.environ.setdefault("QTWEBENGINE_CHROMIUM_FLAGS", "--no-sandbox --disable-gpu")

from PySide6.QtCore import QTimer, QUrl
from PySide6.QtWebEngineCore import QWebEnginePage
from PySide6.QtWebEngineWidgets import QWebEngineView
from PySide6.QtWidgets import QApplication

SETTLED = 500  # milliseconds after loading; figures are drawn by then


class Page(QWebEnginePage):
    """Says on standard error what the console says."""

    def javaScriptConsoleMessage(self, level, message, line, source):
        sys.stderr.write(f"CONSOLE {level} {message} ({source}:{line})\n")


def main(width: str, url: str) -> int:
    application = QApplication(sys.argv[:1])
    view = QWebEngineView()
    page = Page(view)
    view.setPage(page)
    view.resize(int(width), 900)

    def show(text: str) -> None:
        sys.stdout.write(text)
        application.quit()

    def loaded(fine: bool) -> None:
        if fine:
            QTimer.singleShot(SETTLED, lambda: page.toHtml(show))
        else:
            application.exit(1)

    page.loadFinished.connect(loaded)
    view.show()
    view.load(QUrl(url))
    return application.exec()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
