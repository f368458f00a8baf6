"""What operators see and do in the admin, beside the rows: the Usage page and those it leads to.

pages      the addresses: Usage, one account, costs, CSV, and a confirmation for each action
now        what the Usage page says, in ten queries
traffic    how much is asked, fails and is refused, beside yesterday
standing   an account's day: used, reserved, limit and why
account    all about one account
costs      all about one period, for finance
actions    what can be done: stop, pause, forgive, grant, lower, end one answer, prove
charts     bars, as numbers for an SVG
words      numbers, times and reasons, in words
"""
