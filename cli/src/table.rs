//! Tables without boxes: terse headers in capitals, columns as wide as their widest cell, the last one free.

use crate::out::{self, Tone};

/// One cell: text and what it says.
#[derive(Debug, Clone)]
pub(crate) struct Cell {
    text: String,
    tone: Tone,
}

impl Cell {
    pub(crate) fn new(text: impl Into<String>, tone: Tone) -> Self {
        Self { text: text.into(), tone }
    }

    /// The text in its colour, for a line of its own.
    pub(crate) fn painted(&self) -> String {
        out::paint(self.tone, &self.text)
    }
}

impl<T: Into<String>> From<T> for Cell {
    fn from(text: T) -> Self {
        Self::new(text, Tone::Plain)
    }
}

/// Rows under headers.
#[derive(Debug)]
pub(crate) struct Table {
    headers: Vec<&'static str>,
    rows: Vec<Vec<Cell>>,
    indent: usize,
}

impl Table {
    pub(crate) fn new(headers: impl IntoIterator<Item = &'static str>) -> Self {
        Self { headers: headers.into_iter().collect(), rows: Vec::new(), indent: 0 }
    }

    /// Moved right by so many columns, for a table inside a page.
    #[must_use]
    pub(crate) fn indented(mut self, columns: usize) -> Self {
        self.indent = columns;
        self
    }

    /// One more row, a cell for each header.
    pub(crate) fn row(&mut self, cells: impl IntoIterator<Item = Cell>) {
        let row: Vec<Cell> = cells.into_iter().collect();
        debug_assert_eq!(row.len(), self.headers.len(), "a cell for each header");
        self.rows.push(row);
    }

    pub(crate) fn print(&self) {
        for line in self.lines(out::paint) {
            out::line(line);
        }
    }

    /// The lines, with `paint` colouring each cell; widths are of the bare text.
    fn lines(&self, paint: impl Fn(Tone, &str) -> String) -> Vec<String> {
        let widths = self.widths();
        let header: Vec<Cell> = self.headers.iter().map(|header| Cell::new(*header, Tone::Dim)).collect();
        std::iter::once(&header)
            .chain(&self.rows)
            .map(|row| {
                let mut line = " ".repeat(self.indent);
                let filled = row.iter().rposition(|cell| !cell.text.is_empty()).map_or(0, |last| last + 1);
                for (index, cell) in row.iter().take(filled).enumerate() {
                    line.push_str(&paint(cell.tone, &cell.text));
                    if index + 1 < filled {
                        line.push_str(&" ".repeat(widths[index] - cell.text.chars().count() + 2));
                    }
                }
                line
            })
            .collect()
    }

    fn widths(&self) -> Vec<usize> {
        let mut widths: Vec<usize> = self.headers.iter().map(|header| header.len()).collect();
        for row in &self.rows {
            for (width, cell) in widths.iter_mut().zip(row) {
                *width = (*width).max(cell.text.chars().count());
            }
        }
        widths
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plain(table: &Table) -> Vec<String> {
        table.lines(|_, text| text.to_owned())
    }

    #[test]
    fn columns_line_up_and_lines_have_no_trailing_blanks() {
        let mut table = Table::new(["NAME", "READY", "REASON"]);
        table.row(["web".into(), "3/3".into(), "".into()]);
        table.row(["long-name".into(), "0/1".into(), "waits for db".into()]);
        assert_eq!(
            plain(&table),
            ["NAME       READY  REASON", "web        3/3", "long-name  0/1    waits for db"]
        );
    }

    #[test]
    fn colour_does_not_count_as_width() {
        let mut table = Table::new(["A", "B"]);
        table.row([Cell::new("ok", Tone::Good), "x".into()]);
        table.row([Cell::new("später", Tone::Bad), "y".into()]);
        let painted =
            table.lines(|tone, text| if tone == Tone::Plain { text.into() } else { format!("<{text}>") });
        assert_eq!(painted, ["<A>       <B>", "<ok>      x", "<später>  y"]);
    }

    #[test]
    fn a_table_inside_a_page_is_indented() {
        let mut table = Table::new(["A"]).indented(2);
        table.row(["x".into()]);
        assert_eq!(plain(&table), ["  A", "  x"]);
    }
}
