"""Why a sample was picked or was not."""

SELECTED, FILLED = "selected", "filled"
TOO_HARD, TOO_EASY, NEVER_SCORED = "too_hard", "too_easy", "never_scored"
BELOW_BUDGET, REDUNDANT = "below_budget", "redundant"
WHY = {
    SELECTED: "",
    FILLED: ", outside the gate, to fill the budget",
    TOO_HARD: "its difficulty value is below the gate (too hard)",
    TOO_EASY: "its difficulty value is above the gate (too easy)",
    BELOW_BUDGET: "others were worth more and the budget was spent",
    REDUNDANT: "it would have been worth a pick if it were as novel as most picks",
    NEVER_SCORED: "a signal the selector needs was never measured",
}
