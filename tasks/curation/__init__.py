"""From a source of image-caption pairs to a published snapshot."""
