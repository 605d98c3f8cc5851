"""Uncertainty of an answer under Gaussian noise and a Gaussian prior.

:mod:`~lsconv.inverse.uncertainty.posterior` draws samples of the posterior and maps its standard deviations,
:mod:`~lsconv.inverse.uncertainty.evidence` has the likelihood of the data with x integrated out.
:mod:`~lsconv.inverse.uncertainty.psf_estimate` finds a blur that is not known in the image: it maximises the likelihood
of :mod:`~lsconv.inverse.uncertainty.local_spectra` by :mod:`~lsconv.inverse.uncertainty.psf_search`.
"""
