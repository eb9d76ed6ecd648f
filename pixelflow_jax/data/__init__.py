"""Training data: sources of images, labels and captions; transforms; aspect-ratio buckets; the loader.

New sources go into sources.py. The room ends with uint8 batches on the host; noise and downsampling,
which the device does, do not belong here.
"""
