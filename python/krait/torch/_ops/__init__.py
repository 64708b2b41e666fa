"""One file an operator: its kernel, its fake kernel, its derivative, and the function that users
call.
"""
