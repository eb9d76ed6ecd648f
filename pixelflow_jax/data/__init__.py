"""Training data: sources of images, labels and captions; transforms; aspect-ratio buckets; the loader.

It ends with uint8 batches on the host. Noise and downsampling do not belong here: the device does these.
"""
