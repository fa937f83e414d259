"""Detectors, data sets, local training and evaluation: the only package that knows torch.

    registry  detectors by name          dataset  COCO files, checked       augment  training batches
    weights   modules <-> arrays         engine   local training            evaluate average precision
    predict   detection in files         draw     pictures for people       presets  plans known to work

Importing the package alone loads none of it.
"""
