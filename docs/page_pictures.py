"""Take the pictures of the live page: light, dark, and on a phone.

python docs/page_pictures.py http://127.0.0.1:8081 docs/images
"""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

WIDE = {"width": 1280, "height": 1400}
PHONE = {"width": 390, "height": 1600}
SHOTS = {
    "page-light": {"viewport": WIDE, "color_scheme": "light"},
    "page-dark": {"viewport": WIDE, "color_scheme": "dark"},
    "page-phone": {"viewport": PHONE, "color_scheme": "light", "is_mobile": True},
}

url, folder = sys.argv[1], Path(sys.argv[2])
folder.mkdir(exist_ok=True)
with sync_playwright() as playing:
    browser = playing.chromium.launch(
        executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
    )
    for name, options in SHOTS.items():
        page = browser.new_context(**options).new_page()
        page.goto(url)
        page.locator("#allocation .area").first.wait_for(state="attached")
        page.wait_for_timeout(1500)
        page.screenshot(path=folder / f"{name}.png")
    browser.close()
