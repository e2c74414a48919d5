"""Takes the picture of the demo's report: python docs/report_image.py runs/demo/report.html.

Needs the extra `browser`, and Chromium with its driver from the system.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.chrome.service import Service

WIDTH, HEIGHT = 1200, 1500


def main() -> None:
    """Write `docs/report.png`: the top of the page, as a window of this size shows it."""
    report = Path(sys.argv[1]).resolve()
    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--hide-scrollbars", f"--window-size={WIDTH},{HEIGHT}"):
        options.add_argument(argument)
    browser = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))  # none is fetched
    try:
        browser.get(report.as_uri())
        browser.save_screenshot(str(Path(__file__).parent / "report.png"))
    finally:
        browser.quit()


if __name__ == "__main__":
    main()
