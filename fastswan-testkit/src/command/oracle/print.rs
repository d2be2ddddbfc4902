//! The table of sets that every oracle prints, and the names of sets on the command line.

use fastswan_testkit::oracle::Set;
use serde_json::Value;

/// The set of this name; otherwise, the names there are.
pub(crate) fn set(name: &str) -> Result<Set, String> {
    let names = || Set::ALL.map(Set::name).join(", ");
    Set::ALL.into_iter().find(|set| set.name() == name).ok_or_else(|| format!("one of {}", names()))
}

/// Prints the names of the columns.
pub(crate) fn print_head() {
    println!(
        "{:<16} {:>9} {:>9} {:>6} {:>9} {:>10}",
        "set", "decisions", "fast", "wrong", "eligible", "fast share"
    );
}

/// Prints what a set's report says.
pub(crate) fn print(set: &str, report: &Value) {
    let number = |name| report[name].as_u64().unwrap_or(0);
    println!(
        "{set:<16} {:>9} {:>9} {:>6} {:>9} {:>10.4}",
        number("decisions"),
        number("fast"),
        number("wrong"),
        number("eligible"),
        report["fast_share"].as_f64().unwrap_or(0.0)
    );
    let list = |name| report[name].as_array().into_iter().flatten();
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let reasons: Vec<String> =
        list("eligible_pass_reasons").map(|pair| format!("{} {}", text(&pair[0]), pair[1])).collect();
    if !reasons.is_empty() {
        println!("    eligible but passed: {}", reasons.join(", "));
    }
    for example in list("examples") {
        println!("    WRONG {}", text(example));
    }
}
