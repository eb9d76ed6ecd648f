"""What a person asked of `sample`: one `Request` for flags, Python, demo and PNG files; output folders.

Flags such as --guidance_scale are defined here. How images are computed is not (see sampling/).
"""
