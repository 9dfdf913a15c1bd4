// One thread's part of a product: panels of the right side, each times rows of the left side, in blocks that fit in the
// second-level cache.
#include "product.h"

#include "arithmetic.h"
#include "product_finish.h"
#include "product_int8.h"
#include "threads.h"

using namespace deltaw;

namespace {

const int64_t MAX_PART_GROUPS = 256;  // a larger K is divided evenly into parts of at most this number of groups
const int64_t MAX_CLAIM = 8;  // panels that a thread claims at a time
const int64_t MIN_PASS_PIECES = 4;  // minimum pieces per pass over the left side if a product is divided along K
const int64_t PREFETCH_ROWS = 2;  // rows prefetched while rows are copied
const int64_t MAX_REUSED_BYTES = 4 << 20;  // bytes of right side that are packed once for all rows

// Size of the parts that `groups` are divided into evenly.
int64_t part_groups(int64_t groups) {
    const int64_t parts = (groups + MAX_PART_GROUPS - 1) / MAX_PART_GROUPS, is_full = INT8_BLOCK / 2;  // parts do not split a scale's block
    return ((groups + parts - 1) / parts + is_full - 1) / is_full * is_full;
}

// Maximum number of rows processed at a time, and for a given remainder.
template <class Op>
struct RowSteps {
    static constexpr int MAX_TILE_ROWS = MAX_ROWS;
    static constexpr int64_t GROUPS = 384;  // 48 KiB of a panel, about the size of the first-level cache
    static int count(int64_t rows) { return max_tile_rows(rows); }
};
#ifdef DW_AMX
struct TileRowSteps {
    static constexpr int MAX_TILE_ROWS = 2 * tiles::ROWS;
    static constexpr int64_t GROUPS = 288;  // less, since the cache must also contain a tile of sums
    static int count(int64_t rows) { return tiles::max_tile_rows(rows); }
};
template <> struct RowSteps<TilesBF16> : TileRowSteps {};
template <> struct RowSteps<TilesInt8> : TileRowSteps {};
#endif

template <class Op, class LowOp>
class ThreadProduct {
  public:
    ThreadProduct(const Product &p, int thread, int threads) : p(p), thread(thread), threads(threads) {
        divide();
        if (begin < end) choose_blocks();
    }

    // Number of row blocks whose panels threads can steal from each other. 0 if each thread processes only its panels.
    int64_t num_claim_blocks() const {
        return begin == end || threads == 1 || cuts > 1 || reuse_panels || row1 - row0 < p.M ? 0 : (cut + block - 1) / block;
    }

    // `ranges`: one per row block, as counted by num_claim_blocks.
    void run(StealableRanges *ranges) {
        if (begin == end) return;
        Scratch scratch;
        allocate(scratch);
        const ProductScope<Op> product_scope;
        for (int64_t b0 = 0; b0 < cut; b0 += block) {
            gathered_g0 = -1, low_is_gathered = false;
            if (ranges) {
                const int64_t min_pieces = divides_depth ? std::min(MIN_PASS_PIECES, pieces_per_pass) : 1;
                for (StealableRanges &panels = ranges[b0 / block]; panels.take(thread, min_pieces, pieces_per_pass, from, to);) run_depth(b0);
            } else
                for (from = begin; from < end; from = to) {
                    to = std::min(end, from + pieces_per_pass);
                    run_depth(b0);
                }
        }
    }

    // Bytes that allocate() takes, without rounding.
    int64_t scratch_bytes() const {
        if (begin == end) return 0;
        int64_t bytes = num_packed_panels() * panel_groups * 128 + low_groups * 128;
        if (INT8_SUMS) bytes += num_packed_panels() * starts_per_panel * 4;
        if (divides_depth) bytes += sum_rows * PANEL * 4;
        if (gathers) bytes += gathered_rows * panel_groups * 4;
        if (widen_low) bytes += gathered_rows * low_groups * 4;
        if (converts_columns()) bytes += 16 * panel_groups * 4;
        if (p.right.quantizes_rows()) bytes += panel_groups * Op::PER_GROUP * 4;  // a number per row
        return bytes;
    }

  private:
    static constexpr bool INT8_SUMS = std::is_same<typename Op::Left, uint8_t>::value;
    static constexpr int64_t NUMBER = sizeof(typename Op::Left);
    static constexpr int64_t BLOCK_GROUPS = INT8_BLOCK / Op::PER_GROUP;
    static constexpr int MAX_TILE_ROWS = RowSteps<Op>::MAX_TILE_ROWS;
    static constexpr bool LOW_IN_TILES = InTiles<LowOp>::value;

    const Product &p;
    const int thread, threads;
    const bool in_blocks = INT8_SUMS && p.block_scale;
    const int64_t blocks = int8_blocks(p.K);
    const int64_t groups = (p.K + Op::PER_GROUP - 1) / Op::PER_GROUP;
    const int64_t low_groups = count_low_groups();
    const bool divides_depth = groups > RowSteps<Op>::GROUPS;
    const int64_t max_groups = divides_depth ? part_groups(groups) : RowSteps<Op>::GROUPS;
    const int64_t panel_groups = std::min(groups, max_groups);
    const bool widen_low = LOW_IN_TILES ? low_groups * LowOp::PER_GROUP != p.rank : LowOp::WIDENS && p.rank;
    // If the low-rank part has no scales and the same kind of product, its sums start where the others end.
    const bool low_shares_sums = LOW_IN_TILES && !INT8_SUMS && !p.row_scale && !p.column_scale;

    // This thread processes rows row0 … row1-1 of the left side, divided into `cuts` ranges. Pieces are (panel, range)
    // pairs.
    int64_t row0 = 0, row1 = 0, cuts = 1, begin = 0, end = 0;
    int64_t cut = 0, block = 0;  // rows of a range, and rows processed at a time
    int64_t first_panel = 0, num_panels = 0;  // panels of this thread
    int64_t end_panel = 0;  // end of the panels that it can steal
    int64_t pieces_per_pass = 0, from = 0, to = 0;  // pieces with sums in memory if a product is divided along K
    int64_t sum_rows = 0;  // capacity of the buffer
    bool reuse_panels = false;  // panels are packed for the first block of rows and reused for the others
    bool gathers = false;  // rows are copied or widened to a contiguous buffer
    int64_t gathered_from = 0, gathered_rows = 0, gathered_g0 = -1;
    bool low_is_gathered = false;
    int64_t stride = 0;  // bytes from row to row
    int64_t starts_per_panel = 0;

    char *right = nullptr, *low_right = nullptr, *gathered = nullptr, *low_gathered = nullptr;
    int32_t *starts = nullptr;
    float *tiles = nullptr;
    alignas(64) float small[InTiles<Op>::value ? 2 : 1][MAX_TILE_ROWS * PANEL], low_products[2][InTiles<Op>::value ? MAX_TILE_ROWS * PANEL : 1];
    TileWriter previous_tile{p};  // in tiles: the previous tile, which is written during the products of the next one
    int buffer = 0;

    // Groups of the low-rank part, padded with zeros to the step of the tiles.
    int64_t count_low_groups() const {
        const int64_t groups_needed = (p.rank + LowOp::PER_GROUP - 1) / LowOp::PER_GROUP;
        return LOW_IN_TILES ? (groups_needed + 15) / 16 * 16 : groups_needed;
    }

    // If there are enough rows, threads divide the rows, so that each finds its rows in its cache after the previous
    // kernel. Otherwise they divide pieces, and rows are divided only if panels alone would be unbalanced.
    void divide() {
        const int64_t panels = (p.N + PANEL - 1) / PANEL;
        row1 = p.M, end = panels;
        if (p.M >= MIN_ROWS_PER_THREAD * threads) split_range(p.M, thread, threads, row0, row1);
        else {
            while (cuts * 2 * 24 <= p.M && cuts < 64) {
                const int64_t pieces = panels * cuts, pieces_per_thread = (pieces + threads - 1) / threads;
                if (pieces_per_thread * threads * 16 <= pieces * 17) break;
                cuts *= 2;
            }
            split_range(panels * cuts, thread, threads, begin, end);
        }
    }

    // Choose blocks of rows that fit in the cache, all of equal size: slightly larger blocks cost less than packing all
    // panels again. Neither the number of blocks nor the memory depends on the speed of this thread.
    void choose_blocks() {
        cut = (row1 - row0 + cuts - 1) / cuts;
        const int64_t fit = std::max<int64_t>(8 * MAX_TILE_ROWS, left_cache_bytes() / (std::max<int64_t>(panel_groups, 1) * 4)),
            average = average_rows(cut);
        const int64_t count = std::max<int64_t>(1, (2 * average + fit) / (2 * fit)), average_block = block_rows(average, count),
            pieces_per_thread = block_rows(max_rows(cut), count);
        block = block_rows(cut, count);
        first_panel = begin / cuts, num_panels = (end - 1) / cuts + 1 - first_panel;
        // As many bytes of sums as of left side. In each pass some columns of the right side are multiplied by all
        // rows.
        pieces_per_pass = end - begin;
        if (divides_depth) {
            sum_rows = std::max(pieces_per_thread, average_block * std::min(end - begin, std::max<int64_t>(8,
                left_cache_bytes() / 2 / (average_block * PANEL * 4))));
            pieces_per_pass = std::min(end - begin, std::max<int64_t>(1, sum_rows / block));
        }
        const int64_t panels = (p.N + PANEL - 1) / PANEL, max_panels = row1 - row0 < p.M ? panels : (panels + threads - 1) / threads;
        reuse_panels = !divides_depth && block < cut && max_panels * panel_groups * 128 <= MAX_REUSED_BYTES;
        end_panel = first_panel + num_panels;
        if (num_claim_blocks()) {
            end_panel = panels;
            pieces_per_pass = std::min(pieces_per_pass, MAX_CLAIM);
            sum_rows = std::min(sum_rows, MAX_CLAIM * block);
        }
        sum_rows = std::max(sum_rows, pieces_per_pass * block);
        starts_per_panel = (in_blocks ? (panel_groups + BLOCK_GROUPS - 1) / BLOCK_GROUPS : 1) * PANEL;
        // Rows whose distance is a large power of two would compete for the same cache sets. Tiles read each line of
        // the left side once per panel and do not need a copy. Neither does a single panel.
        gathers = Op::WIDENS || (divides_depth && cuts == 1 && end - begin > 1 && !InTiles<Op>::value && p.left_ld * NUMBER % 2048 == 0);
        stride = gathers ? panel_groups * 4 : p.left_ld * NUMBER;
        gathered_rows = cuts == 1 ? std::max(block, pieces_per_thread) : row1 - row0;
    }

    static int64_t block_rows(int64_t rows, int64_t count) {
        return std::min(rows, ((rows + count - 1) / count + MAX_TILE_ROWS - 1) / MAX_TILE_ROWS * MAX_TILE_ROWS);
    }

    int64_t num_packed_panels() const { return reuse_panels ? num_panels : 1; }
    bool converts_columns() const {
        if (!p.right.by_column || stored_in_blocks(p.right.type)) return false;
        return p.right.type != F32 || Op::PER_GROUP != 1 || p.right.scale != 1.0f;
    }

    void allocate(Scratch &scratch) {
        right = scratch.take(num_packed_panels() * panel_groups * 128);
        low_right = scratch.take(low_groups * 128);
        if (INT8_SUMS) starts = scratch.take<int32_t>(num_packed_panels() * starts_per_panel);
        if (divides_depth) tiles = scratch.take<float>(sum_rows * PANEL);
        if (gathers) gathered = scratch.take(gathered_rows * panel_groups * 4);
        if (widen_low) low_gathered = scratch.take(gathered_rows * low_groups * 4);
    }

    // Copy the next rows: `deep` groups of the left side from g0, and in the last part also the low-rank side.
    void gather_rows(int64_t b0, int64_t g0, int64_t deep) {
        int64_t first_row = row0 + b0, end_row = std::min(row1, first_row + block);
        if (cuts > 1) {  // small number of rows: all ranges of this thread
            const int64_t low = begin % cuts, high = (end - 1) % cuts;
            const bool all = end - begin >= cuts || low > high;
            int64_t ignored;
            first_row = row0, end_row = row1;
            if (!all) {
                split_range(row1 - row0, (int)low, (int)cuts, first_row, ignored);
                split_range(row1 - row0, (int)high, (int)cuts, ignored, end_row);
                first_row += row0, end_row += row0;
            }
        }
        gathered_from = first_row;
        const int64_t k0 = g0 * Op::PER_GROUP, count = std::min(p.K - k0, deep * Op::PER_GROUP), padded_count = deep * Op::PER_GROUP;
        for (int64_t m = first_row; gathers && gathered_g0 != g0 && m < end_row; m++) {
            const typename Op::Left *const from = (const typename Op::Left *)p.left + m * p.left_ld + k0;
            char *const to = gathered + (m - first_row) * panel_groups * 4;
            // Row parts are too short for the hardware prefetcher.
            if (m + PREFETCH_ROWS < end_row)
                for (int64_t k = 0; k < count; k += 64 / NUMBER) __builtin_prefetch(from + PREFETCH_ROWS * p.left_ld + k);
            if (Op::WIDENS) Op::widen(from, count, padded_count, to);
            else memcpy(to, from, deep * 4);
        }
        gathered_g0 = g0;
        if (!widen_low || low_is_gathered || g0 + max_groups < groups) return;
        low_is_gathered = true;
        for (int64_t m = first_row; m < end_row; m++)
            LowOp::widen((const typename LowOp::Left *)p.low + m * p.rank, p.rank, low_groups * LowOp::PER_GROUP,
                         low_gathered + (m - first_row) * low_groups * 4);
    }

    // Process pieces `from` … `to` of the row block at b0.
    void run_depth(int64_t b0) {
        for (int64_t g0 = 0; g0 < groups || g0 == 0; g0 += max_groups) run_pieces(b0, g0, std::min(groups - g0, max_groups));
    }

    // The same over `deep` groups from g0.
    void run_pieces(int64_t b0, int64_t g0, int64_t deep) {
        if (gathers || widen_low) gather_rows(b0, g0, deep);
        int64_t packed = -1, prefetch_lines = 0;
        Prefetcher prefetcher;
        for (int64_t piece = from; piece < to; piece++) {
            int64_t m0, m1;
            split_range(row1 - row0, (int)(piece % cuts), (int)cuts, m0, m1);
            m0 += row0 + b0;
            m1 = std::min(m1 + row0, m0 + block);
            if (m0 >= m1) continue;
            const int64_t panel = piece / cuts, slot = reuse_panels ? panel - first_panel : 0;
            if (packed != panel) {
                packed = panel;
                prefetch_lines = pack_panel(panel, slot, m1 - m0, b0, g0, deep, prefetcher);
            }
#ifdef DW_AMX
            if constexpr (InTiles<Op>::value) {
                multiply_in_tiles(piece, panel * PANEL, slot, m0, m1, g0, deep, prefetch_lines, prefetcher);
                continue;
            }
#endif
            multiply(piece, panel * PANEL, slot, m0, m1, g0, deep, prefetch_lines, prefetcher);
        }
        previous_tile.write_rest();
    }

    // Pack a panel unless it is already packed. Returns the number of lines of the next panel to prefetch per step.
    int64_t pack_panel(int64_t panel, int64_t slot, int64_t rows, int64_t b0, int64_t g0, int64_t deep, Prefetcher &prefetcher) {
        const int64_t n0 = panel * PANEL;
        if (p.rank && g0 + max_groups >= groups) pack<LowOp>(p.low_right, p.rank, p.N, n0, 0, low_groups, low_right);
        prefetcher.rows = 0;
        if (reuse_panels && b0 > 0) return 0;
        char *const panel_data = right + slot * panel_groups * 128;
        pack<Op>(p.right, p.K, p.N, n0, g0, deep, panel_data);
        if constexpr (INT8_SUMS) {
            int32_t *const start = starts + slot * starts_per_panel;
            for (int64_t g = 0; g < deep; g += in_blocks ? BLOCK_GROUPS : deep)
                column_starts<Op>(panel_data + g * 128, in_blocks ? std::min(BLOCK_GROUPS, deep - g) : deep, num_vecs(n0), p.left_zero,
                                  start + (in_blocks ? g / BLOCK_GROUPS * PANEL : 0));
        }
        const bool continues_panel = (to - 1) / cuts > panel, has_next_part = g0 + max_groups < groups;
        const int64_t next = continues_panel || !has_next_part ? panel + 1 : from / cuts;
        const int64_t next_g0 = continues_panel ? g0 : has_next_part ? g0 + max_groups : 0;
        if (next < end_panel) prefetcher.panel<Op>(p.right, p.K, p.N, next * PANEL, next_g0, std::min(groups - next_g0, max_groups));
        return prefetcher.lines() * MAX_TILE_ROWS / std::max<int64_t>(MAX_TILE_ROWS, rows / MAX_TILE_ROWS * MAX_TILE_ROWS) + 1;
    }

    void multiply(int64_t piece, int64_t n0, int64_t slot, int64_t m0, int64_t m1, int64_t g0, int64_t deep, int64_t prefetch_lines,
                  Prefetcher &prefetcher) {
        const int vecs = num_vecs(n0);
        const bool last = g0 + max_groups >= groups, fresh = g0 == 0;
        const bool is_full = last && p.N - n0 >= PANEL && !p.transposed;
        const char *const panel_data = right + slot * panel_groups * 128;
        const int32_t *const start = INT8_SUMS ? starts + slot * starts_per_panel : nullptr;
        ColumnScales columns;
        if (is_full) columns.load(p, n0);
        for (int64_t m = m0; m < m1;) {
            const int rows = RowSteps<Op>::count(m1 - m);
            float *const tile = divides_depth ? piece_sums(piece, m - m0) : small[0];
            const char *const left = left_rows(m, g0);
            const bool is_fused = is_full && rows == MAX_TILE_ROWS;  // the rest of the product and its epilogue in one pass
            prefetcher.fetch(prefetch_lines);
            LowRank low = low_rank_rows(m);
            if (!last) low.groups = 0;
            if constexpr (INT8_SUMS) {
                if (in_blocks) {
                    const float *const scales = p.block_scale + m * blocks + g0 / BLOCK_GROUPS;
                    const int64_t full_blocks = is_fused ? (deep - 1) / BLOCK_GROUPS : (deep + BLOCK_GROUPS - 1) / BLOCK_GROUPS,
                        full_groups = full_blocks * BLOCK_GROUPS;
                    add_int8_blocks<Op>(rows, vecs, left, stride, panel_data, std::min(deep, full_groups), start, scales, blocks, fresh, tile);
                    if (is_fused)
                        multiply_and_store<FROM_BLOCKS>(left + 4 * full_groups, stride, panel_data + 128 * full_groups, deep - full_groups,
                                                 {fresh && !full_blocks ? nullptr : tile, PANEL, start + full_blocks * PANEL, scales + full_blocks,
                                                     blocks}, low, columns, m, n0);
                } else {
                    // Each part of an int8 sum has separate initial values.
                    if (!fresh) add_starts(tile, rows, vecs, start);
                    const float *const from = fresh ? (const float *)start : tile;
                    if (is_fused) multiply_and_store<FROM_SUMS>(left, stride, panel_data, deep, {from, fresh ? 0 : PANEL}, low, columns, m, n0);
                    else products_onto<Op>(rows, vecs, left, stride, panel_data, deep, from, fresh ? 0 : PANEL, tile, PANEL);
                }
            } else if (is_fused) {
                if (fresh) multiply_and_store<FROM_ZERO>(left, stride, panel_data, deep, {}, low, columns, m, n0);
                else multiply_and_store<FROM_SUMS>(left, stride, panel_data, deep, {tile, PANEL}, low, columns, m, n0);
            } else if (fresh) products<Op>(rows, vecs, left, stride, panel_data, deep, tile, PANEL);
            else products_onto<Op>(rows, vecs, left, stride, panel_data, deep, tile, PANEL, tile, PANEL);
            if (last && !is_fused) finish_rows<LowOp>(rows, vecs, p, tile, INT8_SUMS && !in_blocks, m, n0, low);
            m += rows;
        }
    }

    template <InitialSums INITIAL>
    void multiply_and_store(const char *left, int64_t stride, const char *panel_data, int64_t deep, PreviousSums initial, LowRank low,
                            const ColumnScales &columns, int64_t m,
                     int64_t n0) const {
        const auto out = p.out_type == F32 ? product_out<Op, LowOp, float, INITIAL, VECS_PER_PASS> : product_out<Op, LowOp, bf16, INITIAL,
            VECS_PER_PASS>;
        for (int v = 0; v < 2; v += VECS_PER_PASS) {
            out(p, left, stride, panel_data + 64 * v, deep, initial, low, columns, m, n0 + 16 * v);
            if (initial.from) initial.from += 16 * VECS_PER_PASS;
            if (initial.starts) initial.starts += 16 * VECS_PER_PASS;
            if (low.groups) low.right += 64 * VECS_PER_PASS;
        }
    }

#ifdef DW_AMX
    // Work between the steps of a tile's products: writing the previous tile and prefetching.
    struct StepWork {
        TileWriter &previous_tile;
        Prefetcher &prefetcher;
        Prefetcher result;  // memory of this tile's result
        int rows;
        int64_t lines;

        void operator()() {
            result.fetch(2 * rows);
            previous_tile.write_rows(rows);
            prefetcher.fetch(lines);
        }
    };

    void multiply_in_tiles(int64_t piece, int64_t n0, int64_t slot, int64_t m0, int64_t m1, int64_t g0, int64_t deep, int64_t prefetch_lines,
                           Prefetcher &prefetcher) {
        const int vecs = num_vecs(n0);
        const bool last = g0 + max_groups >= groups, fresh = g0 == 0;
        const char *const panel_data = right + slot * panel_groups * 128;
        const int32_t *const start = INT8_SUMS ? starts + slot * starts_per_panel : nullptr;
        for (int64_t m = m0; m < m1;) {
            const int rows = RowSteps<Op>::count(m1 - m);
            float *const tile = divides_depth ? piece_sums(piece, m - m0) : small[buffer];
            const char *const left = left_rows(m, g0);
            LowRank low = low_rank_rows(m);
            if (!last) low.groups = 0;
            tiles::SecondProduct continues_panel;
            if (low.groups && low_shares_sums) continues_panel = {low.left, low.stride, low.right, low.groups};
            const int64_t steps = (deep + tiles::GROUPS - 1) / tiles::GROUPS + continues_panel.groups / tiles::GROUPS;
            StepWork step_work{previous_tile, prefetcher, last ? result_memory(p, m, rows, n0) : Prefetcher(),
                (int)((MAX_TILE_ROWS + steps - 1) / steps),
                          (prefetch_lines + steps - 1) / steps};
            if constexpr (INT8_SUMS) {
                if (in_blocks) {
                    const float *const scales = p.block_scale + m * blocks + g0 / BLOCK_GROUPS;
                    add_blocks_in_tiles<Op>(rows, vecs, left, stride, panel_data, deep, start, scales, blocks, fresh, tile, step_work);
                } else {
                    if (!fresh) add_starts(tile, rows, vecs, start);
                    tiles::multiply_rows_in_tiles<Op>(rows, vecs, left, stride, panel_data, deep, fresh ? (const float *)start : tile,
                                                      fresh ? 0 : PANEL, tile, PANEL,
                                                continues_panel, step_work);
                }
            } else
                tiles::multiply_rows_in_tiles<Op>(rows, vecs, left, stride, panel_data, deep, fresh ? nullptr : tile, PANEL, tile, PANEL,
                                                  continues_panel, step_work);
            previous_tile.write_rest();
            if (last) {
                const bool has_separate_low = low.groups && !low_shares_sums;
                if (has_separate_low) products<LowOp>(rows, vecs, low.left, low.stride, low.right, low.groups, low_products[buffer], PANEL);
                previous_tile.begin(tile, rows, vecs, INT8_SUMS && !in_blocks, m, n0, has_separate_low ? low_products[buffer] : nullptr);
                buffer = 1 - buffer;
            }
            m += rows;
        }
    }
#endif

    // Sums of a piece at a row, and the left side at row m and group g0.
    float *piece_sums(int64_t piece, int64_t row) const { return tiles + ((piece - from) * block + row) * PANEL; }
    const char *left_rows(int64_t m, int64_t g0) const {
        return gathers ? gathered + (m - gathered_from) * panel_groups * 4 : (const char *)p.left + (m * p.left_ld + g0 * Op::PER_GROUP) * NUMBER;
    }

    LowRank low_rank_rows(int64_t m) const {
        if (!p.rank) return {nullptr, nullptr, 0, 0};
        if (widen_low) return {low_gathered + (m - gathered_from) * low_groups * 4, low_right, low_groups * 4, low_groups};
        const int64_t bytes = p.rank * (int64_t)sizeof(typename LowOp::Left);
        return {(const char *)p.low + m * bytes, low_right, bytes, low_groups};
    }

    int num_vecs(int64_t n0) const { return p.N - n0 > 16 ? 2 : 1; }
};

}  // namespace

namespace {

// Call body(op, low_op) with the Ops of both parts of a product.
template <class Body>
void with_ops(const Product &p, int type, Body &&body) {
    if (type != INT8) return with_op(type, [&](auto op) { body(op, op); });
    with_op(p.out_type, [&](auto low) {
#ifdef DW_AMX
        if (selected_arithmetic(INT8) == TILES) return body(TilesInt8(), low);
#endif
        body(OpInt8(), typename RegisterOp<decltype(low)>::type());
    });
}

}  // namespace

void deltaw::run_product(const Product &p, int type) {
    if (p.M <= 0 || p.N <= 0) return;
    const int num_threads = thread_count();
    with_ops(p, type, [&](auto op, auto low) {
        typedef ThreadProduct<decltype(op), decltype(low)> PartProduct;
        const int64_t blocks = PartProduct(p, 0, num_threads).num_claim_blocks();
        Scratch scratch;
        StealableRanges *const ranges = blocks ? scratch.take<StealableRanges>(blocks) : nullptr;
        for (int64_t i = 0; i < blocks; i++)
            new (&ranges[i]) StealableRanges(scratch.take<StealableRanges::Part>(num_threads), num_threads, (p.N + PANEL - 1) / PANEL);
        in_parallel([&](int thread, int threads) { PartProduct(p, thread, threads).run(ranges); });
    });
}

int64_t deltaw::product_scratch_size(const Product &p, int type, int threads) {
    int64_t bytes = 0;
    if (p.M <= 0 || p.N <= 0) return 0;
    with_ops(p, type, [&](auto op, auto low) {
        for (int thread = 0; thread < threads; thread++) bytes += ThreadProduct<decltype(op), decltype(low)>(p, thread, threads).scratch_bytes();
    });
    return bytes;
}
