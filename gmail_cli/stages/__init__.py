"""The six stages, one module each; every module offers ``run(profile, workspace, ...) -> Artifact``."""
