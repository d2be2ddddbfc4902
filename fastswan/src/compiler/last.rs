//! The last answer, for questions that come in order: one after the other is often about the same, or about where the same holds.

use ipnet::IpNet;

/// What was found for the last prefix.
#[derive(Debug)]
pub(super) struct Last<K, T>(Option<Found<K, T>>);

#[derive(Debug)]
struct Found<K, T> {
    about: K,
    prefix: IpNet,
    /// It holds for every prefix inside this one.
    even: Option<IpNet>,
    answer: T,
}

impl<K, T> Default for Last<K, T> {
    fn default() -> Self {
        Self(None)
    }
}

impl<K: PartialEq, T: Copy> Last<K, T> {
    /// What holds for a prefix: what was found last, or what `find` returns. `even` says in which prefix around it the same holds
    /// for every prefix; `None` if that is not known.
    pub(super) fn get_or_find(
        &mut self,
        about: K,
        prefix: IpNet,
        even: impl FnOnce() -> Option<IpNet>,
        find: impl FnOnce() -> T,
    ) -> T {
        let holds = |last: &&Found<K, T>| {
            last.about == about
                && (last.prefix == prefix || last.even.is_some_and(|even| even.contains(&prefix)))
        };
        if let Some(last) = self.0.as_ref().filter(holds) {
            return last.answer;
        }
        let answer = find();
        self.0 = Some(Found { about, prefix, even: even(), answer });
        answer
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_holds_where_it_is_said_to() {
        let net = |net: &str| net.parse::<IpNet>().unwrap();
        let mut last = Last::default();
        let mut found = 0;
        let mut ask = |about, prefix, even: Option<&str>| {
            last.get_or_find(
                about,
                net(prefix),
                || even.map(net),
                || {
                    found += 1;
                    found
                },
            )
        };
        assert_eq!(ask(7, "10.1.0.0/16", Some("10.0.0.0/14")), 1);
        assert_eq!(ask(7, "10.2.0.0/16", None), 1, "inside");
        assert_eq!(ask(8, "10.2.0.0/16", None), 2, "about something else");
        assert_eq!(ask(8, "10.2.0.0/16", None), 2, "the same");
        assert_eq!(ask(8, "10.2.1.0/24", None), 3, "it is not known that it holds there");
        assert_eq!(ask(8, "10.4.0.0/16", Some("10.4.0.0/14")), 4);
        assert_eq!(ask(8, "10.0.0.0/8", None), 5, "wider");
    }
}
