"""Detectors, data sets, local training and evaluation: the only package that knows torch.

    registry  detectors by name          families the built-in ones         initial  their first weights
    square    their input                fcos     the small default         convention  is tried on foreign ones
    formats   annotations, four kinds    check    what is wrong with them   images   files, decoded
    dataset   what training takes        cache    decoded images, kept      split    over several sites
    augment   training batches           speed    what `model archs` measures
    export    ONNX files
    weights   modules <-> arrays         engine   local training            evaluate average precision
    predict   detection in files         draw     pictures for people       presets  plans known to work
    frames    images and videos          results  predictions.json
    recheck   images harmed since        threads  device, threads, memory
    gpu       a GPU's memory             smoke    does a model work at all?
    moments   optimisers <-> arrays
    held_out  what is never trained on   voc      VOC2010's precision       statistics what `data check` counts
    scenery   generated street views     scenes   and data sets of them

Importing the package alone loads none of it.
"""
