//! Where a service may be placed, as written in a manifest: `os = "linux"`, `label.zone != "b"`, and the `spread`
//! key. One parser for both sides: the manifest checks the syntax with it, the scheduler asks it whether a host
//! holds. Left out: ordering, sets and patterns; two constraints on one attribute say what a set would.

use std::fmt;
use std::str::FromStr;

use crate::pb;

/// What of a host a constraint looks at.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Attribute {
    /// `os`, for instance `linux`.
    Os,
    /// `arch`, for instance `x86_64`.
    Arch,
    /// `host`: the host's name.
    Host,
    /// `label.NAME`: a label given to the agent in its configuration.
    Label(String),
}

/// How the attribute is compared with the value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Operator {
    /// `=`: the host has the attribute and it equals the value.
    Equal,
    /// `!=`: the host lacks the attribute, or it differs.
    NotEqual,
}

/// One condition that a host must meet.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Constraint {
    pub attribute: Attribute,
    pub operator: Operator,
    pub value: String,
}

/// Text that is not a constraint. The message says what was expected; `column` counts characters from 1.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message} (character {column} of the constraint)")]
pub struct ConstraintError {
    pub column: usize,
    pub message: String,
}

/// Over what a service's instances are spread.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Spread {
    /// Over hosts; the default.
    Host,
    /// Over the values of a label, and over hosts within each.
    Label(String),
}

/// Text that is neither `host` nor `label.NAME`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("spread is \"host\" or \"label.NAME\", not {0:?}")]
pub struct SpreadError(pub String);

impl Attribute {
    /// The host's value; None: the host has no such label.
    pub fn of<'a>(&self, facts: &'a pb::HostFacts) -> Option<&'a str> {
        match self {
            Attribute::Os => Some(&facts.os),
            Attribute::Arch => Some(&facts.arch),
            Attribute::Host => Some(&facts.name),
            Attribute::Label(name) => facts.labels.get(name).map(String::as_str),
        }
    }
}

impl Constraint {
    /// Whether a host with these facts may run the service, as far as this one condition goes.
    pub fn holds(&self, facts: &pb::HostFacts) -> bool {
        let equal = self.attribute.of(facts) == Some(self.value.as_str());
        match self.operator {
            Operator::Equal => equal,
            Operator::NotEqual => !equal,
        }
    }
}

impl FromStr for Constraint {
    type Err = ConstraintError;

    /// `ATTRIBUTE OPERATOR "VALUE"`, blanks free between them.
    fn from_str(text: &str) -> Result<Self, ConstraintError> {
        let mut scan = Scan { text, at: 0 };
        scan.blanks();
        let attribute = scan.attribute()?;
        scan.blanks();
        let operator = scan.operator()?;
        scan.blanks();
        let value = scan.value()?;
        scan.blanks();
        match scan.rest() {
            "" => Ok(Self { attribute, operator, value }),
            rest => Err(scan.error(format!("nothing may follow the value, found {rest:?}"))),
        }
    }
}

impl FromStr for Spread {
    type Err = SpreadError;

    fn from_str(text: &str) -> Result<Self, SpreadError> {
        match text {
            "" | "host" => Ok(Spread::Host),
            _ => match text.strip_prefix("label.") {
                Some(name) if is_label(name) => Ok(Spread::Label(name.to_owned())),
                Some(_) | None => Err(SpreadError(text.to_owned())),
            },
        }
    }
}

impl fmt::Display for Attribute {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Attribute::Os => f.write_str("os"),
            Attribute::Arch => f.write_str("arch"),
            Attribute::Host => f.write_str("host"),
            Attribute::Label(name) => write!(f, "label.{name}"),
        }
    }
}

impl fmt::Display for Constraint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let operator = match self.operator {
            Operator::Equal => "=",
            Operator::NotEqual => "!=",
        };
        write!(f, "{} {operator} \"{}\"", self.attribute, self.value)
    }
}

/// A place in the text being read.
struct Scan<'a> {
    text: &'a str,
    at: usize,
}

impl<'a> Scan<'a> {
    fn rest(&self) -> &'a str {
        &self.text[self.at..]
    }

    fn error(&self, message: String) -> ConstraintError {
        ConstraintError { column: self.text[..self.at].chars().count() + 1, message }
    }

    fn blanks(&mut self) {
        self.at += self.rest().len() - self.rest().trim_start().len();
    }

    fn attribute(&mut self) -> Result<Attribute, ConstraintError> {
        let rest = self.rest();
        let end = rest.find(|c: char| c.is_whitespace() || "=!<>~\"'".contains(c)).unwrap_or(rest.len());
        let word = &rest[..end];
        let attribute = match word {
            "os" => Attribute::Os,
            "arch" => Attribute::Arch,
            "host" => Attribute::Host,
            _ => match word.strip_prefix("label.") {
                Some(name) if is_label(name) => Attribute::Label(name.to_owned()),
                Some(_) => return Err(self.error(format!("{word:?} names no label: write label.NAME"))),
                None => return Err(self.error(unknown_attribute(word))),
            },
        };
        self.at += end;
        Ok(attribute)
    }

    fn operator(&mut self) -> Result<Operator, ConstraintError> {
        for (sign, operator) in [("!=", Operator::NotEqual), ("==", Operator::Equal), ("=", Operator::Equal)]
        {
            if self.rest().starts_with(sign) {
                self.at += sign.len();
                return Ok(operator);
            }
        }
        Err(self.error("expected = or !=".to_owned()))
    }

    fn value(&mut self) -> Result<String, ConstraintError> {
        let Some(rest) = self.rest().strip_prefix('"') else {
            return Err(self.error("expected the value in double quotes".to_owned()));
        };
        let Some(end) = rest.find('"') else {
            return Err(self.error("the value's closing quote is missing".to_owned()));
        };
        self.at += end + 2;
        Ok(rest[..end].to_owned())
    }
}

fn is_label(name: &str) -> bool {
    !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || "-_./".contains(c))
}

fn unknown_attribute(word: &str) -> String {
    if word.is_empty() {
        return "expected os, arch, host or label.NAME".to_owned();
    }
    let nearest = ["os", "arch", "host", "label."]
        .into_iter()
        .max_by(|a, b| strsim::jaro_winkler(a, word).total_cmp(&strsim::jaro_winkler(b, word)));
    match nearest {
        Some(nearest) if strsim::jaro_winkler(nearest, word) > 0.75 => {
            format!("{word:?} is none of os, arch, host, label.NAME; did you mean {nearest:?}?")
        }
        Some(_) | None => format!("{word:?} is none of os, arch, host, label.NAME"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts() -> pb::HostFacts {
        pb::HostFacts {
            name: "alpha".into(),
            os: "linux".into(),
            arch: "x86_64".into(),
            labels: [("zone".to_owned(), "a".to_owned())].into(),
            ..Default::default()
        }
    }

    #[test]
    fn each_form_is_read_and_judged() {
        for (text, holds) in [
            ("os = \"linux\"", true),
            ("os=\"linux\"", true),
            ("  arch  ==  \"x86_64\"  ", true),
            ("arch != \"x86_64\"", false),
            ("host = \"alpha\"", true),
            ("host != \"alpha\"", false),
            ("label.zone = \"a\"", true),
            ("label.zone != \"b\"", true),
            ("label.rack = \"r1\"", false),
            ("label.rack != \"r1\"", true),
        ] {
            let constraint: Constraint = text.parse().unwrap();
            assert_eq!(constraint.holds(&facts()), holds, "{text}");
            assert_eq!(constraint.to_string().parse(), Ok(constraint), "{text}");
        }
    }

    #[test]
    fn a_wrong_form_says_where_and_what() {
        for (text, column, part) in [
            ("", 1, "expected os"),
            ("oss = \"linux\"", 1, "did you mean \"os\""),
            ("memory = \"2\"", 1, "none of os, arch"),
            ("label. = \"a\"", 1, "names no label"),
            ("os \"linux\"", 4, "expected = or !="),
            ("os < \"linux\"", 4, "expected = or !="),
            ("os = linux", 6, "double quotes"),
            ("os = \"linux", 6, "closing quote"),
            ("os = \"linux\" and", 14, "nothing may follow"),
        ] {
            let error = text.parse::<Constraint>().unwrap_err();
            assert_eq!(error.column, column, "{text}: {error}");
            assert!(error.message.contains(part), "{text}: {error}");
        }
    }

    #[test]
    fn spread_is_host_or_a_label() {
        assert_eq!("".parse(), Ok(Spread::Host));
        assert_eq!("host".parse(), Ok(Spread::Host));
        assert_eq!("label.zone".parse(), Ok(Spread::Label("zone".into())));
        for wrong in ["zone", "label.", "label.a b"] {
            assert_eq!(wrong.parse::<Spread>(), Err(SpreadError(wrong.into())));
        }
    }
}
