"""`python -m scripts.check_picture`: docs/images/check.png, the contact sheet of the photos of scripts.faulty_photos. Needs Chromium."""

import shutil
import subprocess
import tempfile
from pathlib import Path

from PIL import Image

from lorabooth.check import sheet
from lorabooth.check.examine import Purpose, check_folder, taken_in
from scripts import faulty_photos

PICTURE = Path("docs/images/check.png")
SIZE_PX = (1200, 1300)


def main() -> None:
    """Check the photos, write the sheet and take its picture."""
    browser = next((found for name in ("chromium", "google-chrome", "chrome") if (found := shutil.which(name))), None)
    if browser is None:
        raise SystemExit("Chromium is needed, and is not there")
    with tempfile.TemporaryDirectory() as folder:
        source, page, shot = Path(folder, "photos.zip"), Path(folder, "check.html"), Path(folder, "check.png")
        source.write_bytes(faulty_photos.as_zip(faulty_photos.all_photo_faults()))
        with taken_in(source) as taken:
            resolutions = tuple(int(part) for part in faulty_photos.RESOLUTION.split(","))
            report = check_folder(taken, Purpose(resolutions, faulty_photos.TRIGGER))
        sheet.write_sheet(report, page, source.name)
        options = ["--headless", "--no-sandbox", "--hide-scrollbars", f"--window-size={SIZE_PX[0]},{SIZE_PX[1]}", f"--screenshot={shot}"]
        subprocess.run([browser, *options, page.as_uri()], check=True, capture_output=True)
        Image.open(shot).convert("RGB").quantize(256).save(PICTURE, optimize=True)
    print(f"{PICTURE}, {PICTURE.stat().st_size >> 10} KiB")


if __name__ == "__main__":
    main()
