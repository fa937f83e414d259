"""Merging client updates into the global model: pure mathematics and pure decisions.

numpy only. No I/O, no clock, no logging, no torch: everything here is a function of its arguments.

    staleness     s(τ): constant, polynomial, hinge, participation
    weighting     update + place in the queue -> Contribution (version, staleness, weight)
    decide        job + head + update -> Accept | Duplicate | Refuse
    transitions   head + event -> next head
    selection     which sites an invited job asks to train now
    stopping      stop rule + what was measured + head + time -> why the job closes
    gate          what was measured + head -> the version that must not be used
    lineage       the log -> what a version is made of, and each site's share in it
    consent       rule + contributors + answers -> may a version be given away?
    change        two models -> how far they are apart, by layer
    merge         Merge: folds verified payloads into the model, one at a time
    fedasync, fedbuff, fedavg, server_opt    one algorithm each: data plus functions
    moments       what sites share of their optimisers, averaged
    statistics    BatchNorm running mean and variance as a mixture
    tensors, blocks, group                   what the algorithms walk over
"""
