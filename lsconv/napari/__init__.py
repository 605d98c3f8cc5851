"""The widget for napari, a guest that needs the extra ``napari``; it uses the public names of lsconv and lsconv.app.

In the order in which an image passes: :mod:`~lsconv.napari.widget` offers the choices and runs a thread, in which
:mod:`~lsconv.napari.problem` divides a layer into fields and restores them; the widget adds the answer as a layer, with
a report. :mod:`~lsconv.napari.samples` has an image to try.
"""
