"""CT in DICOM: finding series, judging their geometry, reading them as volumes.

`files` lists what could be DICOM, `headers` reads headers, `frames` turns a header into slices, `grouping` turns slices
into series, `checks` judges them, `rule` chooses one, `pixels` decodes, `read` does it all.
"""
