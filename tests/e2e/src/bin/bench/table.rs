//! Results as people read them.

use std::fmt;

/// What was found.
#[derive(Default)]
pub(crate) struct Table {
    rows: Vec<Row>,
}

struct Row {
    what: String,
    ours: String,
    peer: String,
    ratio: String,
    target: &'static str,
}

/// One comparison.
pub(crate) struct Comparison<'a> {
    pub(crate) what: &'a str,
    pub(crate) peer: &'a str,
    pub(crate) unit: &'a str,
    pub(crate) ours: &'a [f64],
    pub(crate) theirs: &'a [f64],
    pub(crate) target: &'static str,
}

impl Table {
    /// Adds measurements taken in pairs.
    pub(crate) fn compare(&mut self, found: &Comparison<'_>) {
        let ratios: Vec<f64> =
            found.ours.iter().zip(found.theirs).map(|(ours, theirs)| ours / theirs).collect();
        self.add(Row {
            what: found.what.into(),
            ours: with_unit(quantile(found.ours, 0.5), found.unit),
            peer: format!("{}: {}", found.peer, with_unit(quantile(found.theirs, 0.5), found.unit)),
            ratio: format!(
                "{:.2} ({:.2} to {:.2})",
                quantile(&ratios, 0.5),
                quantile(&ratios, 0.25),
                quantile(&ratios, 0.75)
            ),
            target: found.target,
        });
    }

    /// Adds something that has no peer.
    pub(crate) fn state(&mut self, what: &str, ours: String, target: &'static str) {
        self.add(Row {
            what: what.into(),
            ours,
            peer: String::new(),
            ratio: String::new(),
            target,
        });
    }

    /// Adds what was measured beside several others.
    pub(crate) fn beside(&mut self, what: &str, ours: &str, others: &str, target: &'static str) {
        self.add(Row {
            what: what.into(),
            ours: ours.into(),
            peer: others.into(),
            ratio: String::new(),
            target,
        });
    }

    fn add(&mut self, row: Row) {
        eprintln!("{} | {} | {} | {}", row.what, row.ours, row.peer, row.ratio);
        self.rows.push(row);
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "| what | here | beside it | ratio, median (middle half) | goal |")?;
        writeln!(f, "|---|---|---|---|---|")?;
        for row in &self.rows {
            let Row { what, ours, peer, ratio, target } = row;
            writeln!(f, "| {what} | {ours} | {peer} | {ratio} | {target} |")?;
        }
        Ok(())
    }
}

fn with_unit(value: f64, unit: &str) -> String {
    if value >= 10_000.0 {
        format!("{:.1}k {unit}", value / 1000.0)
    } else if value >= 100.0 {
        format!("{value:.0} {unit}")
    } else {
        format!("{value:.2} {unit}")
    }
}

/// The value below which this part of them lies.
pub(crate) fn quantile(values: &[f64], part: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let last = sorted.len().saturating_sub(1) as f64;
    let at = part * last;
    let (low, high) = (at.floor(), at.ceil());
    let value = |at: f64| sorted.get(at as usize).copied().unwrap_or(f64::NAN);
    value(low) + (value(high) - value(low)) * (at - low)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_lie_between_values() {
        let values = [4.0, 1.0, 3.0, 2.0];
        assert_eq!(quantile(&values, 0.0), 1.0);
        assert_eq!(quantile(&values, 0.5), 2.5);
        assert_eq!(quantile(&values, 1.0), 4.0);
        assert!(quantile(&[], 0.5).is_nan());
    }
}
