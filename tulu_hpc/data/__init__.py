"""Records, chat templates, label masks, packing, mixing and the resumable loader.

Modules are imported by name; this file imports nothing, so that verbs which only read records start without torch.
"""
