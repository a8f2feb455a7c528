"""gradwatch inside other frameworks: one file each, imported by nothing of gradwatch's own."""
