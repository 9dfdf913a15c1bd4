// How one thread goes through its part of a product: panels of the right side, each against rows of the left side, in
// pieces that stay in the second-level cache.
#include "product.h"

#include "arithmetic.h"
#include "product_finish.h"
#include "product_int8.h"
#include "threads.h"

using namespace deltaw;

namespace {

const int64_t GROUPS_OF_MANY = 256;      // where there are more than go at once, they are cut evenly into no more than so many
const int64_t MOST_AT_ONCE = 8;          // panels that a thread takes for itself
const int64_t LEAST_AT_ONCE = 4;         // pieces between which the left side of a product that is cut along K is read once
const int64_t ROWS_AHEAD = 2;            // that are fetched while rows are copied
const int64_t KEPT_AT_MOST = 4 << 20;    // bytes of right side that are laid out once for all rows

// Groups of one of the parts that `groups` are cut into, as even as can be.
int64_t even_part(int64_t groups) {
    const int64_t parts = (groups + GROUPS_OF_MANY - 1) / GROUPS_OF_MANY, whole = INT8_BLOCK / 2;  // no scale's block is cut
    return ((groups + parts - 1) / parts + whole - 1) / whole * whole;
}

// How many rows go by at a time, at most and of so many that are left.
template <class Op>
struct Steps {
    static constexpr int MOST = MOST_ROWS;
    static constexpr int64_t GROUPS = 384;  // 48 KiB of a panel, about what the first-level cache has
    static int of(int64_t rows) { return rows_at_once(rows); }
};
#ifdef DW_AMX
struct StepsOfTiles {
    static constexpr int MOST = 2 * tiles::ROWS;
    static constexpr int64_t GROUPS = 288;  // the cache is to hold a tile of sums too
    static int of(int64_t rows) { return tiles::rows_at_once(rows); }
};
template <> struct Steps<TilesBF16> : StepsOfTiles {};
template <> struct Steps<TilesInt8> : StepsOfTiles {};
#endif

template <class Op, class LowOp>
class Part {
  public:
    Part(const Product &p, int thread, int threads) : p(p), thread(thread), threads(threads) {
        share_out();
        if (begin < end) settle();
    }

    // Blocks of rows, of each of which a thread may take panels that were another's; 0 where all keep to their own.
    int64_t blocks_to_claim() const { return begin == end || threads == 1 || cuts > 1 || keep || row1 - row0 < p.M ? 0 : (cut + block - 1) / block; }

    // `claims`: of each block of rows, as many as blocks_to_claim says.
    void run(Claims *claims) {
        if (begin == end) return;
        Scratch scratch;
        lay_room(scratch);
        const Ready<Op> ready;
        for (int64_t b0 = 0; b0 < cut; b0 += block) {
            gathered_g0 = -1, low_is_gathered = false;
            if (claims) {
                const int64_t least = several ? std::min(LEAST_AT_ONCE, pieces_at_once) : 1;
                for (Claims &panels = claims[b0 / block]; panels.take(thread, least, pieces_at_once, from, to);) run_depth(b0);
            } else
                for (from = begin; from < end; from = to) {
                    to = std::min(end, from + pieces_at_once);
                    run_depth(b0);
                }
        }
    }

    // Bytes that lay_room takes, but for what is rounded up.
    int64_t room() const {
        if (begin == end) return 0;
        int64_t bytes = panels_kept() * line * 128 + low_groups * 128;
        if (INT8_SUMS) bytes += panels_kept() * starts_each * 4;
        if (several) bytes += rows_of_sums * PANEL * 4;
        if (gather) bytes += gathered_rows * line * 4;
        if (widen_low) bytes += gathered_rows * low_groups * 4;
        if (converts_columns()) bytes += 16 * line * 4;
        if (p.right.rounds_rows()) bytes += line * Op::PER_GROUP * 4;  // a number for each row
        return bytes;
    }

  private:
    static constexpr bool INT8_SUMS = std::is_same<typename Op::Left, uint8_t>::value;
    static constexpr int64_t NUMBER = sizeof(typename Op::Left);
    static constexpr int64_t BLOCK_GROUPS = INT8_BLOCK / Op::PER_GROUP;
    static constexpr int MOST = Steps<Op>::MOST;
    static constexpr bool LOW_IN_TILES = InTiles<LowOp>::value;

    const Product &p;
    const int thread, threads;
    const bool in_blocks = INT8_SUMS && p.block_scale;
    const int64_t blocks = int8_blocks(p.K);
    const int64_t groups = (p.K + Op::PER_GROUP - 1) / Op::PER_GROUP;
    const int64_t low_groups = groups_of_low();
    const bool several = groups > Steps<Op>::GROUPS;
    const int64_t most_groups = several ? even_part(groups) : Steps<Op>::GROUPS;
    const int64_t line = std::min(groups, most_groups);
    const bool widen_low = LOW_IN_TILES ? low_groups * LowOp::PER_GROUP != p.rank : LowOp::WIDENS && p.rank;
    // The low-rank part has no scales and is the same kind of product: its sums begin where the others end.
    const bool low_joins = LOW_IN_TILES && !INT8_SUMS && !p.row_scale && !p.column_scale;

    // Rows row0 … row1-1 of the left side are this thread's, cut into `cuts` ranges; pieces are (panel, range).
    int64_t row0 = 0, row1 = 0, cuts = 1, begin = 0, end = 0;
    int64_t cut = 0, block = 0;           // rows of a range, and of those that go by at a time
    int64_t first_panel = 0, own = 0;     // panels of this thread
    int64_t end_panel = 0;                // where the panels end that it may come to
    int64_t pieces_at_once = 0, from = 0, to = 0;  // pieces whose sums are held, where a product is cut along K
    int64_t rows_of_sums = 0;             // that there is room for
    bool keep = false;                    // panels are laid out for the first block of rows and kept for the others
    bool gather = false;                  // rows are copied, or widened, to lie side by side
    int64_t gathered_from = 0, gathered_rows = 0, gathered_g0 = -1;
    bool low_is_gathered = false;
    int64_t stride = 0;                   // bytes from row to row
    int64_t starts_each = 0;

    char *right = nullptr, *low_right = nullptr, *gathered = nullptr, *low_gathered = nullptr;
    int32_t *starts = nullptr;
    float *tiles = nullptr;
    alignas(64) float small[InTiles<Op>::value ? 2 : 1][MOST * PANEL], low_products[2][InTiles<Op>::value ? MOST * PANEL : 1];
    Finishing before{p};  // of tiles: the last one, which goes out beside the next
    int turn = 0;

    // Tiles take so many at a time: zeros are added where the rank is less.
    int64_t groups_of_low() const {
        const int64_t found = (p.rank + LowOp::PER_GROUP - 1) / LowOp::PER_GROUP;
        return LOW_IN_TILES ? (found + 15) / 16 * 16 : found;
    }

    // Many rows are shared out among the threads, so that each finds its rows in its own cache, where the norm or the
    // product before has left them. Else pieces are shared out, and rows are cut only where panels alone would not
    // share out evenly.
    void share_out() {
        const int64_t panels = (p.N + PANEL - 1) / PANEL;
        row1 = p.M, end = panels;
        if (p.M >= ROWS_FOR_EACH * threads) part_of(p.M, thread, threads, row0, row1);
        else {
            while (cuts * 2 * 24 <= p.M && cuts < 64) {
                const int64_t pieces = panels * cuts, most = (pieces + threads - 1) / threads;
                if (most * threads * 16 <= pieces * 17) break;
                cuts *= 2;
            }
            part_of(panels * cuts, thread, threads, begin, end);
        }
    }

    // About as many rows at a time as fit, in blocks that are all alike: a few rows more cost less than to lay out all panels for
    // them again. Neither how many blocks there are nor what room they take depends on how fast this thread is.
    void settle() {
        cut = (row1 - row0 + cuts - 1) / cuts;
        const int64_t fit = std::max<int64_t>(8 * MOST, left_at_once() / (std::max<int64_t>(line, 1) * 4)), even = even_share(cut);
        const int64_t count = std::max<int64_t>(1, (2 * even + fit) / (2 * fit)), usual = block_of(even, count), most = block_of(most_share(cut), count);
        block = block_of(cut, count);
        first_panel = begin / cuts, own = (end - 1) / cuts + 1 - first_panel;
        // As many bytes of sums as of left side; each time a few columns of the right side go by all rows.
        pieces_at_once = end - begin;
        if (several) {
            rows_of_sums = std::max(most, usual * std::min(end - begin, std::max<int64_t>(8, left_at_once() / 2 / (usual * PANEL * 4))));
            pieces_at_once = std::min(end - begin, std::max<int64_t>(1, rows_of_sums / block));
        }
        const int64_t panels = (p.N + PANEL - 1) / PANEL, most_own = row1 - row0 < p.M ? panels : (panels + threads - 1) / threads;
        keep = !several && block < cut && most_own * line * 128 <= KEPT_AT_MOST;
        end_panel = first_panel + own;
        if (blocks_to_claim()) {
            end_panel = panels;
            pieces_at_once = std::min(pieces_at_once, MOST_AT_ONCE);
            rows_of_sums = std::min(rows_of_sums, MOST_AT_ONCE * block);
        }
        rows_of_sums = std::max(rows_of_sums, pieces_at_once * block);
        starts_each = (in_blocks ? (line + BLOCK_GROUPS - 1) / BLOCK_GROUPS : 1) * PANEL;
        // Parts of rows whose distance is a large power of two would fall on the same few places of the cache.
        // Tiles read each line of the left side once for a panel, and need no copy; nor does a single panel.
        gather = Op::WIDENS || (several && cuts == 1 && end - begin > 1 && !InTiles<Op>::value && p.left_ld * NUMBER % 2048 == 0);
        stride = gather ? line * 4 : p.left_ld * NUMBER;
        gathered_rows = cuts == 1 ? std::max(block, most) : row1 - row0;
    }

    static int64_t block_of(int64_t rows, int64_t count) { return std::min(rows, ((rows + count - 1) / count + MOST - 1) / MOST * MOST); }

    int64_t panels_kept() const { return keep ? own : 1; }
    bool converts_columns() const {
        if (!p.right.by_column || stored_in_blocks(p.right.type)) return false;
        return p.right.type != F32 || Op::PER_GROUP != 1 || p.right.scale != 1.0f;
    }

    void lay_room(Scratch &scratch) {
        right = scratch.take(panels_kept() * line * 128);
        low_right = scratch.take(low_groups * 128);
        if (INT8_SUMS) starts = scratch.take<int32_t>(panels_kept() * starts_each);
        if (several) tiles = scratch.take<float>(rows_of_sums * PANEL);
        if (gather) gathered = scratch.take(gathered_rows * line * 4);
        if (widen_low) low_gathered = scratch.take(gathered_rows * low_groups * 4);
    }

    // Copies the rows that are worked on next: `deep` groups of the left side from g0 on, and with the last the low-rank side.
    void gather_rows(int64_t b0, int64_t g0, int64_t deep) {
        int64_t first_row = row0 + b0, end_row = std::min(row1, first_row + block);
        if (cuts > 1) {  // few rows: all of the ranges that this thread works on
            const int64_t low = begin % cuts, high = (end - 1) % cuts;
            const bool all = end - begin >= cuts || low > high;
            int64_t ignored;
            first_row = row0, end_row = row1;
            if (!all) {
                part_of(row1 - row0, (int)low, (int)cuts, first_row, ignored);
                part_of(row1 - row0, (int)high, (int)cuts, ignored, end_row);
                first_row += row0, end_row += row0;
            }
        }
        gathered_from = first_row;
        const int64_t k0 = g0 * Op::PER_GROUP, count = std::min(p.K - k0, deep * Op::PER_GROUP), room = deep * Op::PER_GROUP;
        for (int64_t m = first_row; gather && gathered_g0 != g0 && m < end_row; m++) {
            const typename Op::Left *const from = (const typename Op::Left *)p.left + m * p.left_ld + k0;
            char *const to = gathered + (m - first_row) * line * 4;
            // Parts of rows are too short for the processor to see what comes next.
            if (m + ROWS_AHEAD < end_row)
                for (int64_t k = 0; k < count; k += 64 / NUMBER) __builtin_prefetch(from + ROWS_AHEAD * p.left_ld + k);
            if (Op::WIDENS) Op::widen(from, count, room, to);
            else memcpy(to, from, deep * 4);
        }
        gathered_g0 = g0;
        if (!widen_low || low_is_gathered || g0 + most_groups < groups) return;
        low_is_gathered = true;
        for (int64_t m = first_row; m < end_row; m++)
            LowOp::widen((const typename LowOp::Left *)p.low + m * p.rank, p.rank, low_groups * LowOp::PER_GROUP,
                         low_gathered + (m - first_row) * low_groups * 4);
    }

    // Pieces `from` … `to` of one block of rows from b0 on.
    void run_depth(int64_t b0) {
        for (int64_t g0 = 0; g0 < groups || g0 == 0; g0 += most_groups) run_pieces(b0, g0, std::min(groups - g0, most_groups));
    }

    // The same over `deep` groups from g0 on.
    void run_pieces(int64_t b0, int64_t g0, int64_t deep) {
        if (gather || widen_low) gather_rows(b0, g0, deep);
        int64_t packed = -1, share = 0;
        Ahead ahead;
        for (int64_t piece = from; piece < to; piece++) {
            int64_t m0, m1;
            part_of(row1 - row0, (int)(piece % cuts), (int)cuts, m0, m1);
            m0 += row0 + b0;
            m1 = std::min(m1 + row0, m0 + block);
            if (m0 >= m1) continue;
            const int64_t panel = piece / cuts, place = keep ? panel - first_panel : 0;
            if (packed != panel) {
                packed = panel;
                share = lay_out(panel, place, m1 - m0, b0, g0, deep, ahead);
            }
#ifdef DW_AMX
            if constexpr (InTiles<Op>::value) {
                multiply_in_tiles(piece, panel * PANEL, place, m0, m1, g0, deep, share, ahead);
                continue;
            }
#endif
            multiply(piece, panel * PANEL, place, m0, m1, g0, deep, share, ahead);
        }
        before.rest();
    }

    // Packs a panel where it is not there yet; how many lines of the next one to fetch at each step.
    int64_t lay_out(int64_t panel, int64_t place, int64_t rows, int64_t b0, int64_t g0, int64_t deep, Ahead &ahead) {
        const int64_t n0 = panel * PANEL;
        if (p.rank && g0 + most_groups >= groups) pack<LowOp>(p.low_right, p.rank, p.N, n0, 0, low_groups, low_right);
        ahead.rows = 0;
        if (keep && b0 > 0) return 0;
        char *const here = right + place * line * 128;
        pack<Op>(p.right, p.K, p.N, n0, g0, deep, here);
        if constexpr (INT8_SUMS) {
            int32_t *const start = starts + place * starts_each;
            for (int64_t g = 0; g < deep; g += in_blocks ? BLOCK_GROUPS : deep)
                starts_of_columns<Op>(here + g * 128, in_blocks ? std::min(BLOCK_GROUPS, deep - g) : deep, vecs_at(n0), p.left_zero,
                                  start + (in_blocks ? g / BLOCK_GROUPS * PANEL : 0));
        }
        const bool more = (to - 1) / cuts > panel, deeper = g0 + most_groups < groups;
        const int64_t next = more || !deeper ? panel + 1 : from / cuts, next_g0 = more ? g0 : deeper ? g0 + most_groups : 0;
        if (next < end_panel) ahead.panel<Op>(p.right, p.K, p.N, next * PANEL, next_g0, std::min(groups - next_g0, most_groups));
        return ahead.lines() * MOST / std::max<int64_t>(MOST, rows / MOST * MOST) + 1;
    }

    void multiply(int64_t piece, int64_t n0, int64_t place, int64_t m0, int64_t m1, int64_t g0, int64_t deep, int64_t share, Ahead &ahead) {
        const int vecs = vecs_at(n0);
        const bool last = g0 + most_groups >= groups, fresh = g0 == 0;
        const bool whole = last && p.N - n0 >= PANEL && !p.transposed;
        const char *const here = right + place * line * 128;
        const int32_t *const start = INT8_SUMS ? starts + place * starts_each : nullptr;
        Columns columns;
        if (whole) columns.of(p, n0);
        for (int64_t m = m0; m < m1;) {
            const int rows = Steps<Op>::of(m1 - m);
            float *const tile = several ? sums_of(piece, m - m0) : small[0];
            const char *const left = left_of(m, g0);
            const bool at_once = whole && rows == MOST;  // what is left of the product and all that follows it
            ahead.fetch(share);
            LowRank low = low_of(m);
            if (!last) low.groups = 0;
            if constexpr (INT8_SUMS) {
                if (in_blocks) {
                    const float *const scales = p.block_scale + m * blocks + g0 / BLOCK_GROUPS;
                    const int64_t apart = at_once ? (deep - 1) / BLOCK_GROUPS : (deep + BLOCK_GROUPS - 1) / BLOCK_GROUPS, past = apart * BLOCK_GROUPS;
                    add_blocks_of<Op>(rows, vecs, left, stride, here, std::min(deep, past), start, scales, blocks, fresh, tile);
                    if (at_once)
                        out_at_once<FROM_BLOCKS>(left + 4 * past, stride, here + 128 * past, deep - past,
                                                 {fresh && !apart ? nullptr : tile, PANEL, start + apart * PANEL, scales + apart, blocks}, low, columns, m, n0);
                } else {
                    // Each part of a sum has a start of its own.
                    if (!fresh) add_starts(tile, rows, vecs, start);
                    const float *const from = fresh ? (const float *)start : tile;
                    if (at_once) out_at_once<FROM_SUMS>(left, stride, here, deep, {from, fresh ? 0 : PANEL}, low, columns, m, n0);
                    else products_onto<Op>(rows, vecs, left, stride, here, deep, from, fresh ? 0 : PANEL, tile, PANEL);
                }
            } else if (at_once) {
                if (fresh) out_at_once<FROM_NOTHING>(left, stride, here, deep, {}, low, columns, m, n0);
                else out_at_once<FROM_SUMS>(left, stride, here, deep, {tile, PANEL}, low, columns, m, n0);
            } else if (fresh) products<Op>(rows, vecs, left, stride, here, deep, tile, PANEL);
            else products_onto<Op>(rows, vecs, left, stride, here, deep, tile, PANEL, tile, PANEL);
            if (last && !at_once) finish_rows<LowOp>(rows, vecs, p, tile, INT8_SUMS && !in_blocks, m, n0, low);
            m += rows;
        }
    }

    template <Begun BEGUN>
    void out_at_once(const char *left, int64_t stride, const char *here, int64_t deep, Before begun, LowRank low, const Columns &columns, int64_t m,
                     int64_t n0) const {
        const auto out = p.out_type == F32 ? product_out<Op, LowOp, float, BEGUN, VECS_AT_ONCE> : product_out<Op, LowOp, bf16, BEGUN, VECS_AT_ONCE>;
        for (int v = 0; v < 2; v += VECS_AT_ONCE) {
            out(p, left, stride, here + 64 * v, deep, begun, low, columns, m, n0 + 16 * v);
            if (begun.from) begun.from += 16 * VECS_AT_ONCE;
            if (begun.starts) begun.starts += 16 * VECS_AT_ONCE;
            if (low.groups) low.right += 64 * VECS_AT_ONCE;
        }
    }

#ifdef DW_AMX
    // What goes on between the steps of a tile's products: the tile before goes out, memory is fetched.
    struct Beside {
        Finishing &before;
        Ahead &ahead;
        Ahead into;  // where this tile will go
        int rows;
        int64_t lines;

        void operator()() {
            into.fetch(2 * rows);
            before.some(rows);
            ahead.fetch(lines);
        }
    };

    void multiply_in_tiles(int64_t piece, int64_t n0, int64_t place, int64_t m0, int64_t m1, int64_t g0, int64_t deep, int64_t share, Ahead &ahead) {
        const int vecs = vecs_at(n0);
        const bool last = g0 + most_groups >= groups, fresh = g0 == 0;
        const char *const here = right + place * line * 128;
        const int32_t *const start = INT8_SUMS ? starts + place * starts_each : nullptr;
        for (int64_t m = m0; m < m1;) {
            const int rows = Steps<Op>::of(m1 - m);
            float *const tile = several ? sums_of(piece, m - m0) : small[turn];
            const char *const left = left_of(m, g0);
            LowRank low = low_of(m);
            if (!last) low.groups = 0;
            tiles::More more;
            if (low.groups && low_joins) more = {low.left, low.stride, low.right, low.groups};
            const int64_t steps = (deep + tiles::GROUPS - 1) / tiles::GROUPS + more.groups / tiles::GROUPS;
            Beside beside{before, ahead, last ? place_of_result(p, m, rows, n0) : Ahead(), (int)((MOST + steps - 1) / steps),
                          (share + steps - 1) / steps};
            if constexpr (INT8_SUMS) {
                if (in_blocks) {
                    const float *const scales = p.block_scale + m * blocks + g0 / BLOCK_GROUPS;
                    add_blocks_in_tiles<Op>(rows, vecs, left, stride, here, deep, start, scales, blocks, fresh, tile, beside);
                } else {
                    if (!fresh) add_starts(tile, rows, vecs, start);
                    tiles::products_at_once<Op>(rows, vecs, left, stride, here, deep, fresh ? (const float *)start : tile, fresh ? 0 : PANEL, tile, PANEL,
                                                more, beside);
                }
            } else
                tiles::products_at_once<Op>(rows, vecs, left, stride, here, deep, fresh ? nullptr : tile, PANEL, tile, PANEL, more, beside);
            before.rest();
            if (last) {
                const bool apart = low.groups && !low_joins;
                if (apart) products<LowOp>(rows, vecs, low.left, low.stride, low.right, low.groups, low_products[turn], PANEL);
                before.begin(tile, rows, vecs, INT8_SUMS && !in_blocks, m, n0, apart ? low_products[turn] : nullptr);
                turn = 1 - turn;
            }
            m += rows;
        }
    }
#endif

    // A piece's sums from one of its rows on, and the left side from row m and group g0 on.
    float *sums_of(int64_t piece, int64_t row) const { return tiles + ((piece - from) * block + row) * PANEL; }
    const char *left_of(int64_t m, int64_t g0) const {
        return gather ? gathered + (m - gathered_from) * line * 4 : (const char *)p.left + (m * p.left_ld + g0 * Op::PER_GROUP) * NUMBER;
    }

    LowRank low_of(int64_t m) const {
        if (!p.rank) return {nullptr, nullptr, 0, 0};
        if (widen_low) return {low_gathered + (m - gathered_from) * low_groups * 4, low_right, low_groups * 4, low_groups};
        const int64_t bytes = p.rank * (int64_t)sizeof(typename LowOp::Left);
        return {(const char *)p.low + m * bytes, low_right, bytes, low_groups};
    }

    int vecs_at(int64_t n0) const { return p.N - n0 > 16 ? 2 : 1; }
};

}  // namespace

namespace {

// body(op, low_op) with what multiplies the two parts of a product.
template <class Body>
void with_ops(const Product &p, int type, Body &&body) {
    if (type != INT8) return with_op(type, [&](auto op) { body(op, op); });
    with_op(p.out_type, [&](auto low) {
#ifdef DW_AMX
        if (arithmetic_of(INT8) == TILES) return body(TilesInt8(), low);
#endif
        body(OpInt8(), typename InRegisters<decltype(low)>::type());
    });
}

}  // namespace

void deltaw::run_product(const Product &p, int type) {
    if (p.M <= 0 || p.N <= 0) return;
    const int team = thread_count();
    with_ops(p, type, [&](auto op, auto low) {
        typedef Part<decltype(op), decltype(low)> Of;
        const int64_t blocks = Of(p, 0, team).blocks_to_claim();
        Scratch scratch;
        Claims *const claims = blocks ? scratch.take<Claims>(blocks) : nullptr;
        for (int64_t i = 0; i < blocks; i++) new (&claims[i]) Claims(scratch.take<Claims::Part>(team), team, (p.N + PANEL - 1) / PANEL);
        in_parallel([&](int thread, int threads) { Of(p, thread, threads).run(claims); });
    });
}

int64_t deltaw::product_room(const Product &p, int type, int threads) {
    int64_t bytes = 0;
    if (p.M <= 0 || p.N <= 0) return 0;
    with_ops(p, type, [&](auto op, auto low) {
        for (int thread = 0; thread < threads; thread++) bytes += Part<decltype(op), decltype(low)>(p, thread, threads).room();
    });
    return bytes;
}
