"""The widget for napari, a guest that needs the extra ``napari``; it uses the public names of lsconv and lsconv.app.

In the order in which an image passes: :mod:`~lsconv.napari.widget` asks for the choices, :mod:`~lsconv.napari.problem`
makes fields of a layer and solves them in a thread, and the answer becomes a layer beside its own with a report.
"""
