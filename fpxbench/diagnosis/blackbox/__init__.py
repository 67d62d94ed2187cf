"""Does an implementation or a module apply the maps that its scheme defines?"""
