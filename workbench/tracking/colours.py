"""Okabe and Ito's colours less black and yellow, which vanish on a dark or a light page."""

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
