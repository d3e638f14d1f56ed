"""Opens a report in QtWebEngine (Chromium) without a display and prints what it found as one line of JSON."""

import json
import os
import sys

os.environ["QT_QPA_PLATFORM"] = "offscreen"
os.environ["QTWEBENGINE_CHROMIUM_FLAGS"] = "--no-sandbox --disable-gpu"

from PyQt6.QtCore import QTimer, QUrl
from PyQt6.QtWebEngineCore import QWebEnginePage
from PyQt6.QtWebEngineWidgets import QWebEngineView
from PyQt6.QtWidgets import QApplication

PROBE = """(() => {
  const table = document.querySelector("table.sortable"), body = table.tBodies[0];
  const column = n => [...body.rows].map(row => row.cells[n].textContent);
  const before = column(0), ground = () => getComputedStyle(document.body).backgroundColor, themes = [ground()];
  const numbers = () => { table.querySelectorAll("th")[10].click(); return column(10).map(Number); };
  const rising = numbers(), falling = numbers();
  document.getElementById("theme").click();
  themes.push(ground());
  const images = [...document.images];
  return {before, rising, falling, themes, title: document.title, pictures: images.length,
    loaded: images.filter(image => image.naturalWidth > 0).length,
    foot: table.tFoot.rows.length, sorted: [...body.rows].length === before.length,
    wider: document.documentElement.scrollWidth > document.documentElement.clientWidth};
})()"""
errors = []


class Page(QWebEnginePage):
    def javaScriptConsoleMessage(self, level, message, line, source):  # noqa: N802 - Qt's name
        errors.append(f"{line}: {message}")


application = QApplication(sys.argv[:1])
print("READY", flush=True)
view = QWebEngineView()
page = Page(view)
view.setPage(page)
view.resize(380, 800)


def finish(found):
    print(json.dumps(found | {"errors": errors}), flush=True)
    os._exit(0)  # Qt's own way out can hang without a display


view.loadFinished.connect(lambda _: QTimer.singleShot(500, lambda: page.runJavaScript(PROBE, finish)))
view.load(QUrl.fromLocalFile(os.path.abspath(sys.argv[1])))
view.show()
application.exec()
