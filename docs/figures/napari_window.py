"""The window on the page about napari: ``xvfb-run -s "-screen 0 1500x860x24" python docs/figures/napari_window.py``."""

import time
from pathlib import Path

import napari
from PIL import Image
from qtpy.QtWidgets import QApplication

viewer = napari.Viewer()
viewer.open_sample("lsconv", "astronaut")
_, widget = viewer.window.add_plugin_dock_widget("lsconv", "Restore a blurred image")
widget.image.value = viewer.layers["blurred astronaut"]
widget.blur.value, widget.size.value = "disk", 3.0
widget.restore()
while widget.worker is not None:
    QApplication.processEvents()
    time.sleep(0.01)
viewer.layers.remove("PSF")
viewer.grid.enabled = True
viewer.window.resize(1500, 860)
widget.native.parent().raise_()
viewer.reset_view()
for _ in range(30):
    QApplication.processEvents()
    time.sleep(0.02)
picture = Image.fromarray(viewer.screenshot(canvas_only=False, flash=False)).convert("RGB")
picture.quantize(200).save(Path(__file__).parents[1] / "guides" / "napari.png", optimize=True)
viewer.close()
