"""Interleaved documents: ordered texts and images, from ingest to published shards.

A document's images are ordinary samples of the pool, so all that measures and decides on samples works on them; what is
here looks at texts, at whole documents, and at which image belongs to which text.
"""
